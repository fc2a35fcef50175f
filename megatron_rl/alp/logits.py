"""Noise on the logits instead of the layers: the ablation of arXiv 2603.19470 that perturbs nothing else."""

from dataclasses import dataclass

import torch

from megatron_rl.alp.layer import Draw
from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.alp.noise import Key, NoiseRows, noise_key
from megatron_rl.alp.perturb import add_noise_, dot_noise
from megatron_rl.alp.sigma import HoldsSigma


@dataclass(frozen=True)
class LogitNoise:
    """sigma * eps for the logits of R tokens, eps by token and global index in the vocabulary; never held as a whole.

    It belongs to the logits before they are divided by a temperature. log_sigma [1] float32.
    """

    log_sigma: torch.Tensor
    rows: NoiseRows
    key: Key

    def add_(self, scaled_RV: torch.Tensor, part: slice, first: int, temperature: float) -> None:
        """To logits / temperature (fp32) of the tokens `part` and the vocabulary from `first` on, in place."""
        add_noise_(scaled_RV, self.log_sigma.exp() / temperature, self.rows[part], self.key, first)

    def dot(self, d_logits_RV: torch.Tensor, part: slice, first: int) -> torch.Tensor:
        """[1] float64: the share of the same slice in dL / dlog_sigma, from its dL / dlogits."""
        return dot_noise(d_logits_RV, self.rows[part], self.key, first) * self.log_sigma.double().exp()


class LogitPerturbation(HoldsSigma):
    """The scale of the noise on the logits. `log_sigma` is held by every tensor-parallel rank, and each gets the gradient
    over the whole vocabulary: whoever differentiates the logits sums it over the group."""

    def __init__(self, noise: LayerNoise, num_layers: int) -> None:
        super().__init__()
        self.layer_index = num_layers
        self.hold_sigma(noise)

    def noise(self, draw: Draw, scored_R: torch.Tensor) -> LogitNoise:
        """Of the tokens at these rows of this rank's context-parallel slice, which the draw must name whole."""
        assert self.log_sigma is not None
        rows = NoiseRows(draw.rows.positions[scored_R], draw.rows.ids[scored_R])
        return LogitNoise(self.log_sigma, rows, noise_key(draw.seed, draw.step, self.layer_index))

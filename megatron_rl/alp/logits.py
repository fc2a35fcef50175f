"""Noise on the logits instead of the layers: the ablation of arXiv 2603.19470 that perturbs only the logits."""

from dataclasses import dataclass

import torch

from megatron_rl.alp.layer import NoiseDraw
from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.alp.noise import Key, NoiseRows, noise_key
from megatron_rl.alp.perturb import add_noise_, dot_noise
from megatron_rl.alp.sigma import SigmaModule


@dataclass(frozen=True)
class LogitNoise:
    """The noise sigma * eps on the logits of R tokens.

    eps depends on the token and on the global index in the vocabulary. The noise is never in memory as a whole. It is
    defined for logits before they are divided by the temperature.

    Attributes:
        log_sigma: float32 [1].
        rows: the R tokens.
        key: key of the noise.
    """

    log_sigma: torch.Tensor
    rows: NoiseRows
    key: Key

    def add_(self, scaled_RV: torch.Tensor, part: slice, first: int, temperature: float) -> None:
        """Add the noise in place to a slice of logits / temperature.

        Args:
            scaled_RV: logits / temperature, fp32.
            part: the tokens of the slice.
            first: vocabulary index of the first column.
            temperature: divisor of the logits.
        """
        add_noise_(scaled_RV, self.log_sigma.exp() / temperature, self.rows[part], self.key, first)

    def dot(self, d_logits_RV: torch.Tensor, part: slice, first: int) -> torch.Tensor:
        """Return the contribution of one slice to dL / dlog_sigma, float64 [1].

        Args:
            d_logits_RV: dL / dlogits of the slice.
            part: the tokens of the slice.
            first: vocabulary index of the first column.
        """
        return dot_noise(d_logits_RV, self.rows[part], self.key, first) * self.log_sigma.double().exp()


class LogitPerturbation(SigmaModule):
    """The scale of the noise on the logits.

    Every tensor-parallel rank has `log_sigma`, and each gets the gradient over the whole vocabulary: the backward of
    the logits sums it over the group.
    """

    def __init__(self, noise: LayerNoise, num_layers: int) -> None:
        super().__init__()
        self.layer_index = num_layers
        self.hold_sigma(noise)

    def noise(self, draw: NoiseDraw, scored_R: torch.Tensor) -> LogitNoise:
        """Return the noise of the scored tokens.

        `scored_R` holds their row indices in this rank's context-parallel slice. The draw must cover the whole slice.
        """
        assert self.log_sigma is not None
        rows = NoiseRows(draw.rows.positions[scored_R], draw.rows.ids[scored_R])
        return LogitNoise(self.log_sigma, rows, noise_key(draw.seed, draw.step, self.layer_index))

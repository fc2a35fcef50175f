"""Adaptive layerwise perturbation inside megatron-core: a layer whose input gets learnable noise (arXiv 2603.19470)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_rl.perturbation.names import LOG_SIGMA
from megatron_rl.perturbation.noise import NoiseRows, noise_key
from megatron_rl.perturbation.perturb import Perturb
from megatron_rl.perturbation.plan import LayerNoise


@dataclass(frozen=True)
class Draw:
    """The noise of one forward: which tokens this rank's slice of the stream holds, and the draw (seed, step) they get."""

    rows: NoiseRows
    seed: int
    step: int


class PerturbedLayer(TransformerLayer):
    """h <- h + exp(log_sigma) * eps at the input of the block: in the residual stream, before input_layernorm.

    eps is a function of the token, the global layer and the draw alone, so every parallel layout adds the same noise. It is
    added when the layer is given a PackedStream with a `noise`, and to the layers of the range only; otherwise this is a
    TransformerLayer, bit for bit.

    log_sigma [1] float32, whatever the model's precision: a parameter where it is learnt, else a buffer; absent from
    layers outside the range. Its gradient covers this rank's tokens: data- and context-parallel ranks add theirs up as
    for any parameter, tensor-parallel ones under sequence parallelism alone, as they otherwise hold the same tokens.
    """

    def __init__(self, *args: Any, noise: LayerNoise, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_index = self.layer_number - 1
        perturbs = noise.perturbs(self.layer_index)
        value = torch.full((1,), math.log(noise.sigma_init), dtype=torch.float32) if perturbs else None
        self.log_sigma: torch.Tensor | None
        if value is not None and noise.learnable:
            self.log_sigma = torch.nn.Parameter(value)
            self.log_sigma.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        else:
            self.register_buffer(LOG_SIGMA, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """hidden_states [t, 1, H]: this rank's tokens, as for TransformerLayer."""
        draw: Draw | None = getattr(packed_seq_params, "noise", None)
        if draw is not None and self.log_sigma is not None:
            key = noise_key(draw.seed, draw.step, self.layer_index)
            hidden_states = Perturb.apply(hidden_states, self.log_sigma, draw.rows, key)
        return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Self:
        """Moves and casts the module; log_sigma moves, but stays float32: bfloat16 has three digits for the logarithm."""
        kept = None if self.log_sigma is None else self.log_sigma.data
        super()._apply(fn, recurse)
        if kept is not None and self.log_sigma is not None:
            self.log_sigma.data = kept.to(self.log_sigma.device)
        return self

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As for TransformerLayer, but log_sigma is a tensor of its own per layer, since not every layer need have one."""
        content = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.log_sigma is not None:
            whole = make_sharded_tensors_for_checkpoint({LOG_SIGMA: self.log_sigma}, f"{prefix}{self.layer_index}.")
            content[f"{prefix}{LOG_SIGMA}"] = whole[f"{prefix}{self.layer_index}.{LOG_SIGMA}"]
        return content


def perturbed(layer: ModuleSpec, noise: LayerNoise) -> ModuleSpec:
    """The spec of a TransformerLayer, local or Transformer Engine's, with noise at its input."""
    assert layer.module is TransformerLayer, f"{layer.module} cannot be perturbed"
    return ModuleSpec(module=PerturbedLayer, params={**layer.params, "noise": noise}, submodules=layer.submodules)

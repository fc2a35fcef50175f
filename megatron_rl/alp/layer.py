"""Adaptive layerwise perturbation inside megatron-core: a layer whose input gets learnable noise (arXiv 2603.19470)."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.alp.names import LOG_SIGMA
from megatron_rl.alp.noise import NoiseRows, noise_key
from megatron_rl.alp.perturb import Perturb
from megatron_rl.alp.sigma import HoldsSigma


@dataclass(frozen=True)
class Draw:
    """The noise of one forward: which tokens this rank's slice of the stream holds, and the draw (seed, step) they get.

    Where logits are perturbed, rows are the context-parallel slice: sequence parallelizm does not cut what is scored.
    """

    rows: NoiseRows
    seed: int
    step: int


class PerturbedLayer(HoldsSigma, TransformerLayer):
    """h <- h + exp(log_sigma) * eps at the input of the block: in the residual stream, before input_layernorm.

    eps is a function of the token, the global layer and the draw alone, so every parallel layout adds the same noise. It is
    added when the layer is given a PackedStream with a `noise`, and to the layers of the range only; otherwise this is a
    TransformerLayer, bit for bit.

    Layers outside the range have no log_sigma. Its gradient covers this rank's tokens: data- and context-parallel ranks
    add theirs up as for any parameter, tensor-parallel ones under sequence parallelizm alone, as they otherwise hold the
    same tokens.
    """

    config: Any
    layer_number: int

    def __init__(self, *args: Any, noise: LayerNoise, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_index = self.layer_number - 1
        self.hold_sigma(noise, perturbs=noise.perturbs(self.layer_index))
        if isinstance(self.log_sigma, torch.nn.Parameter):
            self.log_sigma.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """hidden_states [t, 1, H]: this rank's tokens, as for TransformerLayer."""
        draw: Draw | None = getattr(packed_seq_params, "noise", None)
        if draw is not None and self.log_sigma is not None:
            key = noise_key(draw.seed, draw.step, self.layer_index)
            hidden_states = Perturb.apply(hidden_states, self.log_sigma, draw.rows, key)
        return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)

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

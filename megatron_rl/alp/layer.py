"""Adaptive layerwise perturbation (arXiv 2603.19470) in megatron-core: a layer with learnable noise on its input."""

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
from megatron_rl.alp.sigma import SigmaModule


@dataclass(frozen=True)
class NoiseDraw:
    """The noise of one forward pass.

    Attributes:
        rows: the tokens of this rank's slice of the stream. If logits are perturbed, this is the context-parallel
            slice, because sequence parallelism does not cut the tokens that are scored.
        seed: seed of the run.
        step: step of the draw.
    """

    rows: NoiseRows
    seed: int
    step: int


class PerturbedLayer(SigmaModule, TransformerLayer):
    """TransformerLayer that adds noise to its input: h <- h + exp(log_sigma) * eps.

    The noise is added to the residual stream, before input_layernorm. eps depends only on the token, the global layer
    and the draw, so every parallel layout adds the same noise. The noise is added only in layers of the configured
    range, and only if the layer gets a PackedStream with a `noise`. Otherwise the result is that of a TransformerLayer,
    bit for bit.

    Layers outside the range have no log_sigma. The gradient of log_sigma covers the tokens of this rank. It is summed
    over data- and context-parallel ranks, as for any parameter. It is summed over tensor-parallel ranks only under
    sequence parallelism, because otherwise they hold the same tokens.
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
        """Run the layer on hidden_states [t, 1, H], this rank's tokens, as TransformerLayer does."""
        draw: NoiseDraw | None = getattr(packed_seq_params, "noise", None)
        if draw is not None and self.log_sigma is not None:
            key = noise_key(draw.seed, draw.step, self.layer_index)
            hidden_states = Perturb.apply(hidden_states, self.log_sigma, draw.rows, key)
        return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the sharded state of TransformerLayer, with a separate log_sigma per layer.

        The log_sigma of all layers cannot be one stacked tensor, because not every layer has one.
        """
        content = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.log_sigma is not None:
            whole = make_sharded_tensors_for_checkpoint({LOG_SIGMA: self.log_sigma}, f"{prefix}{self.layer_index}.")
            content[f"{prefix}{LOG_SIGMA}"] = whole[f"{prefix}{self.layer_index}.{LOG_SIGMA}"]
        return content


def perturbed_spec(layer: ModuleSpec, noise: LayerNoise) -> ModuleSpec:
    """Return the spec of a TransformerLayer (local or Transformer Engine's) with noise at its input."""
    assert layer.module is TransformerLayer, f"{layer.module} cannot be perturbed"
    return ModuleSpec(module=PerturbedLayer, params={**layer.params, "noise": noise}, submodules=layer.submodules)

"""The submodules that megatron-core's layers lack, and the block spec that uses them.

The layers are megatron-core's local ones. Their stock `WrappedTorchNorm` rejects sequence parallelism. With
Transformer Engine and CUDA, 16-bit models use Transformer Engine's own spec instead.
"""

import dataclasses
import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rl.alp.layer import perturbed_spec
from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.policy.attention import PackedAttention
from megatron_rl.policy.rms_norm import rms_norm
from megatron_rl.precision.linear import quantized_layer
from megatron_rl.precision.machine import load_transformer_engine, this_machine, uses_transformer_engine
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.precision.products import operands_of
from megatron_rl.precision.spec_parts import parts_of, with_parts
from megatron_rl.weights.families import ModelShape
from megatron_rl.weights.megatron_keys import LATENT_NORMS

HERE = this_machine()
HAVE_TE = load_transformer_engine(HERE)


def has_te_layers(dtype: torch.dtype) -> bool:
    """Return whether a model of this dtype has Transformer Engine's layers in this process."""
    return HAVE_TE and uses_transformer_engine(dtype, HERE)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked: under sequence parallelism its gradient is summed over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.get_default_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized vectors of the last dimension of `x`."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LatentNorm(RMSNorm):
    """Norm of the narrow vectors of latent attention. Its epsilon is not that of the other norms.

    megatron-core passes the epsilon of its configuration, and Transformer Engine's fused norms take no other one.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, own_eps: float) -> None:
        super().__init__(config, hidden_size, own_eps)


class OutputNorm:
    """Mixin that normalizes the output of a row-parallel linear, after its sum over tensor-parallel ranks.

    megatron-core's layers have no place for a norm between a linear and the residual sum.
    """

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)  # type: ignore[call-arg]
        self.output_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return the normalized output. The linear has no bias."""
        output, _ = super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.output_norm(output), None


class ExpertOutput(RowParallelLinear):
    """The second linear of an expert with biases.

    megatron-core adds the bias to the output in place. autograd forbids this for what its communication returns.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output, in memory of its own, and the bias."""
        output, bias = super().forward(*args, **kwargs)
        return output.clone(), bias


@functools.cache
def with_output_norm(linear: type) -> type:
    """Return the subclass of a row-parallel linear that normalizes its output."""
    return type(f"{linear.__name__}WithNorm", (OutputNorm, linear), {})


def block_spec(
    config: TransformerConfig,
    shape: ModelShape,
    vp_stage: int | None = None,
    noise: LayerNoise | None = None,
    plan: PrecisionPlan | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of the block: Transformer Engine's layers, or megatron-core's local ones.

    Args:
        config: megatron-core's configuration of the model.
        shape: shape of the model.
        vp_stage: virtual pipeline stage of the block; None without virtual stages.
        noise: how the inputs of the layers can be perturbed; None: plain layers.
        plan: what the products of local layers are quantized to, if anything. Transformer Engine's layers take this
            from `config`.
    """
    if has_te_layers(config.params_dtype):
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        layers = [_adapted(layer, shape) for layer in block.layer_specs]
        layers = layers if noise is None else [perturbed_spec(layer, noise) for layer in layers]
        return dataclasses.replace(block, layer_specs=layers)
    operands = None if plan is None else operands_of(plan)
    kept = frozenset() if plan is None else plan.kept
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = []
    for layer in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)):
        plain = _adapted(_local_layer(config, shape.has_experts(layer)), shape)
        layers.append(plain if operands is None or layer in kept else quantized_layer(plain, operands))
    if noise is not None:
        layers = [perturbed_spec(layer, noise) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _local_layer(config: TransformerConfig, experts: bool) -> ModuleSpec:
    local = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    grouped = config.qk_layernorm and not config.multi_latent_attention
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if grouped else {}
    layer = _replaced(local, "self_attention", core_attention=PackedAttention, **norms)
    if experts and config.add_bias_linear:
        spec = parts_of(layer.submodules.mlp).experts
        layer = _replaced(layer, "mlp", experts=with_parts(spec, linear_fc2=ExpertOutput))
    keys = dict(layer.submodules.sharded_state_dict_keys_map) | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if experts:
        # The norm before experts has a key of its own in Transformer Engine's layers and in Megatron-LM's checkpoints.
        # megatron-core's map of local layers is for dense ones, where the norm belongs to the first product.
        del keys["pre_mlp_layernorm."]
    return with_parts(layer, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm, sharded_state_dict_keys_map=keys)


def _adapted(layer: ModuleSpec, shape: ModelShape) -> ModuleSpec:
    """Return the spec of a layer, of either kind, with what megatron-core has no setting for."""
    if shape.latent is not None:
        norm = ModuleSpec(module=LatentNorm, params={"own_eps": shape.latent.norm_eps})
        plain = parts_of(layer.submodules.self_attention).linear_q_proj
        # Every rank holds the whole down projections, as with Transformer Engine. If they were cut, megatron-core
        # would not sum the gradient of the keys' rotary part over tensor-parallel ranks.
        layer = _replaced(
            layer,
            "self_attention",
            linear_q_down_proj=Linear,
            linear_kv_down_proj=Linear,
            linear_q_up_proj=plain,
            linear_kv_up_proj=plain,
            q_layernorm=norm,
            kv_layernorm=norm,
        )
        keys = {**layer.submodules.sharded_state_dict_keys_map, **LATENT_NORMS}
        layer = with_parts(layer, sharded_state_dict_keys_map=keys)
    if shape.output_norms:
        for part, linear in (("self_attention", "linear_proj"), ("mlp", "linear_fc2")):
            plain = getattr(parts_of(getattr(layer.submodules, part)), linear)
            layer = _replaced(layer, part, **{linear: with_output_norm(plain)})
    return layer


def _replaced(layer: ModuleSpec, part: str, **modules: Any) -> ModuleSpec:
    """Return the spec of a layer with other modules in one of its parts."""
    return with_parts(layer, **{part: with_parts(getattr(layer.submodules, part), **modules)})

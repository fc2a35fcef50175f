"""megatron-core's configuration of a model under a layout."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_rl.config import Config, ParallelConfig
from megatron_rl.errors import ConfigError
from megatron_rl.policy.fused_kernels import fused_kernels
from megatron_rl.policy.modules import has_te_layers
from megatron_rl.policy.quantized_products import transformer_engine_recipe
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.weights.families import Experts, Latent, ModelShape, RopePlan, Yarn

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"activation_func": F.silu},
    # (up + 1) * gate * sigmoid(1.702 * gate), both clamped
    "gpt_oss": {"activation_func": quick_gelu, "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0},
}


def transformer_config(config: Config, shape: ModelShape, precision: PrecisionPlan) -> TransformerConfig:
    """Return megatron-core's configuration of this model under this layout.

    Weights always come from a checkpoint, so the initializers do nothing. Parameters are still marked as tensor
    parallel, which would not happen with `perform_initialization=False`.

    Args:
        config: the resolved configuration.
        shape: shape of the model.
        precision: the resolved precision plan.
    """
    parallel, dtype = config.parallel, DTYPES[config.precision.train]
    te = has_te_layers(dtype)
    kind = TransformerConfig if shape.latent is None else MLATransformerConfig
    return kind(
        **_layers(shape),
        **_layout(parallel, shape.num_layers),
        **RECOMPUTE[parallel.recompute],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        attention_softmax_in_fp32=True,
        init_method=_from_checkpoint,
        output_layer_init_method=_from_checkpoint,
        embedding_init_method=_from_checkpoint,
        use_cpu_initialization=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # see `fuse_weight_gradients`
        attention_backend=AttnBackend[config.precision.attention],
        # The loss is already divided by the global denominator: gradients are plain sums over micro-batches and ranks.
        calculate_per_token_loss=True,
        **fused_kernels(shape, te=te, cuda=torch.cuda.is_available()),
        **({} if shape.experts is None else _mixture(shape.experts, shape.num_layers, parallel.expert, te)),
        **(transformer_engine_recipe(config, precision) if te else {}),
    )


def _layers(shape: ModelShape) -> dict[str, Any]:
    """Return megatron-core's settings of a model's layers, without its experts."""
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        # This gives biases to the projection of attention's output, to routers and to experts.
        "add_bias_linear": shape.out_bias,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm or shape.latent is not None,
        **_ACTIVATIONS[shape.activation],
        "softmax_type": "learnable" if shape.sinks else "vanilla",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "rotary_interleaved": shape.rope.interleaved,
        **(_scores(shape) if shape.latent is None else _latent(shape.latent, shape.rope)),
        **_windows(shape),
    }


def _layout(parallel: ParallelConfig, num_layers: int) -> dict[str, Any]:
    """Return megatron-core's settings of a layout. Raise ConfigError if its stages do not divide the layers."""
    stages = parallel.pipeline * parallel.virtual_pipeline
    if num_layers % stages:
        raise ConfigError(
            f"parallel.pipeline x parallel.virtual_pipeline = {stages} does not divide {num_layers} layers"
        )
    virtual = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if virtual else None,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        # With virtual stages the default point-to-point mode gives wrong gradients without any error.
        "overlap_p2p_comm": virtual,
        "batch_p2p_comm": not virtual,
        "batch_p2p_sync": torch.cuda.is_available(),
    }


def _from_checkpoint(_: torch.Tensor) -> None:
    """Leave the parameter as it is: its values come from a checkpoint."""


def _scores(shape: ModelShape) -> dict[str, Any]:
    """Return the scale of scores. RoPE's factor on cosines and sines multiplies queries and keys, so twice the scores.

    Raises:
        ConfigError: if the factor is for a part of a head only.
    """
    factor = shape.rope.attention_factor
    if factor == 1:
        return {}
    if shape.rope.dim < shape.head_dim:
        raise ConfigError(
            f"RoPE turns {shape.rope.dim} of {shape.head_dim} dimensions of a head and has a factor of {factor:g} on "
            "them, which is not supported"
        )
    return {"softmax_scale": factor**2 / shape.head_dim**0.5}


def _latent(latent: Latent, rope: RopePlan) -> dict[str, Any]:
    """Return megatron-core's settings of latent attention.

    The frequencies are set after the model is built. Of the fields of YaRN, the two that scale the scores are used;
    their defaults would scale the scores of plain RoPE, too.

    Raises:
        ConfigError: if RoPE has a factor on cosines and sines.
    """
    if rope.attention_factor != 1:
        raise ConfigError(
            f"RoPE has a factor of {rope.attention_factor:g} on cosines and sines, which is not supported with latent "
            "attention: 'mscale' and 'mscale_all_dim' must be equal"
        )
    stretch, mscale = (rope.scaling.factor, rope.scaling.mscale_all_dim) if isinstance(rope.scaling, Yarn) else (1, 0)
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope",
        "rotary_base": rope.theta,
        "rotary_percent": 1.0,
        "rotary_scaling_factor": stretch,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


def _windows(shape: ModelShape) -> dict[str, Any]:
    """Return megatron-core's settings of windows. A window of w keys holds a query's own key and w - 1 before."""
    widths = {width for width in shape.windows if width is not None}
    if not widths:
        return {}
    if len(widths) > 1:
        raise ConfigError(f"the model's layers have windows of {sorted(widths)} keys: only one width is supported")
    return {
        "window_size": (widths.pop() - 1, 0),
        "window_attn_skip_freq": [int(width is not None) for width in shape.windows],
    }


def _mixture(experts: Experts, num_layers: int, expert_parallel: int, te: bool) -> dict[str, Any]:
    """Return megatron-core's settings of a router and its experts.

    No load-balancing loss is used, because it would be part of every objective.

    Args:
        experts: the mixture of experts.
        num_layers: number of layers.
        expert_parallel: number of expert-parallel ranks.
        te: the layers are Transformer Engine's.
    """
    dense = experts.dense_layers
    return {
        **({"moe_layer_freq": [int(layer not in dense) for layer in range(num_layers)]} if dense else {}),
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # The softmax runs over all experts before the choice, or over the chosen experts after it.
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.norm_topk_prob,
        "moe_router_score_function": experts.score,
        # The correction bias belongs to pretraining. Here it is a constant.
        "moe_router_enable_expert_bias": experts.correction_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": None if experts.scaling == 1 else experts.scaling,
        "moe_router_num_groups": None if experts.groups == 1 else experts.groups,
        "moe_router_group_topk": None if experts.groups == 1 else experts.groups_per_token,
        "moe_shared_expert_intermediate_size": experts.shared_width or None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te,
        "expert_model_parallel_size": expert_parallel,
        "expert_tensor_parallel_size": 1,
    }

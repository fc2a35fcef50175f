"""megatron-core's GPTModel from a Hugging Face config, with a head that scores tokens instead of returning logits."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.alp.logits import LogitPerturbation
from megatron_rl.config import Config
from megatron_rl.errors import CheckpointError, ConfigError, PrecisionError
from megatron_rl.policy.expert_rules import check_experts
from megatron_rl.policy.logprobs import token_scores
from megatron_rl.policy.modules import HAVE_TE, block_spec
from megatron_rl.policy.packing import Shard
from megatron_rl.policy.parallel import Mesh
from megatron_rl.policy.quantized_products import transformer_engine_recipe
from megatron_rl.policy.routing_replay import prepare_experts
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.weights.families import Experts, ModelShape
from megatron_rl.weights.layouts import padded_vocab

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class PolicyModel(GPTModel):
    """GPTModel chunk whose input is a packed shard. Its last stage returns (logp, entropy[, topk]) per scored row.

    Args:
        real_vocab_size: size of the vocabulary without padding.
        temperature: the logits are divided by it.
        fp32_head: compute the logits with float32 products.
        noise: how the model is perturbed; None if it is not.
    """

    def __init__(
        self,
        *args: Any,
        real_vocab_size: int,
        temperature: float,
        fp32_head: bool,
        noise: LayerNoise | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.temperature = temperature
        self.fp32_head = fp32_head
        self.perturbation: LogitPerturbation | None = None
        if noise is not None and noise.logits and self.post_process:
            self.perturbation = LogitPerturbation(noise, self.config.num_layers)

    def forward(self, shard: Shard) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return hidden states for the next stage or, on the last stage, the `token_scores` of the shard's rows."""
        decoder_input, rotary, cos, sin, offset, _, *_ = self._preprocess(
            input_ids=shard.tokens, position_ids=shard.positions, packed_seq_params=shard.stream
        )
        hidden = self.decoder(
            hidden_states=decoder_input,
            attention_mask=None,
            rotary_pos_emb=rotary,
            rotary_pos_cos=cos,
            rotary_pos_sin=sin,
            packed_seq_params=shard.stream,
            sequence_len_offset=offset,
        )
        if not self.post_process:
            return hidden
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        draw = shard.stream.noise
        return token_scores(
            hidden[shard.rows, 0],
            weight,
            shard.labels,
            temperature=self.temperature,
            vocab_size=self.real_vocab_size,
            group=group,
            topk_labels_RK=shard.topk_labels,
            fp32_product=self.fp32_head,
            noise=None if draw is None or self.perturbation is None else self.perturbation.noise(draw, shard.rows),
        )


def transformer_config(config: Config, shape: ModelShape, precision: PrecisionPlan) -> TransformerConfig:
    """Return megatron-core's configuration of this model under this layout.

    Weights always come from a checkpoint, so the initializers do nothing. Parameters are still marked as tensor
    parallel, which would not happen with `perform_initialization=False`.

    Args:
        config: the resolved configuration.
        shape: shape of the model.
        precision: the resolved precision plan.
    """
    parallel = config.parallel
    stages = parallel.pipeline * parallel.virtual_pipeline
    if shape.num_layers % stages:
        raise ConfigError(
            f"parallel.pipeline x parallel.virtual_pipeline = {stages} does not divide {shape.num_layers} layers"
        )
    dtype, factor = DTYPES[config.precision.train], shape.rope.attention_factor
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        init_method=_from_checkpoint,
        output_layer_init_method=_from_checkpoint,
        embedding_init_method=_from_checkpoint,
        use_cpu_initialization=False,
        persist_layer_norm=HAVE_TE,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        # RoPE's factor on cosines and sines multiplies queries and keys, so twice the scores.
        softmax_scale=None if factor == 1 else factor**2 / shape.head_dim**0.5,
        **_windows(shape),
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        # With virtual stages the default point-to-point mode gives wrong gradients without any error.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        batch_p2p_sync=torch.cuda.is_available(),
        # The loss is already divided by the global denominator: gradients are plain sums over micro-batches and ranks.
        calculate_per_token_loss=True,
        **RECOMPUTE[parallel.recompute],
        **({} if shape.experts is None else _mixture(shape.experts, shape.num_layers, parallel.expert)),
        **(transformer_engine_recipe(config, precision) if HAVE_TE else {}),
    )


def _from_checkpoint(_: torch.Tensor) -> None:
    """Leave the parameter as it is: its values come from a checkpoint."""


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


def _mixture(experts: Experts, num_layers: int, expert_parallel: int) -> dict[str, Any]:
    """Return megatron-core's settings of a router and its experts.

    No load-balancing loss is used, because it would be part of every objective.

    Args:
        experts: the mixture of experts.
        num_layers: number of layers.
        expert_parallel: number of expert-parallel ranks.
    """
    dense = experts.dense_layers
    return {
        **({"moe_layer_freq": [int(layer not in dense) for layer in range(num_layers)]} if dense else {}),
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # The softmax runs over all experts before the choice, or over the chosen experts after it.
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": HAVE_TE,
        "expert_model_parallel_size": expert_parallel,
        "expert_tensor_parallel_size": 1,
    }


def build_chunks(
    config: Config, shape: ModelShape, mesh: Mesh, precision: PrecisionPlan, noise: LayerNoise | None
) -> list[PolicyModel]:
    """Return this rank's model chunks (one, or `virtual_pipeline` of them), parameters unset, on the mesh's device.

    Args:
        config: the resolved configuration.
        shape: shape of the model.
        mesh: the parallel layout.
        precision: the resolved precision plan.
        noise: the resolved noise of ALP; None without ALP.

    Raises:
        ConfigError: the layout does not fit the model.
    """
    check_experts(config, shape)
    tf_config = transformer_config(config, shape, precision)
    vocab_rows = padded_vocab(shape.vocab_size, mesh.tp_size)
    if vocab_rows - shape.vocab_size >= vocab_rows // mesh.tp_size:
        raise ConfigError(
            f"parallel.tensor = {mesh.tp_size} leaves a rank without any of the model's {shape.vocab_size} tokens: "
            "lower it"
        )
    virtual = config.parallel.virtual_pipeline
    stages = list(range(virtual)) if virtual > 1 else [None]
    chunks = []
    for stage in stages:
        chunk = PolicyModel(
            config=tf_config,
            transformer_layer_spec=block_spec(tf_config, vp_stage=stage, noise=noise, plan=precision),
            vocab_size=vocab_rows,
            max_sequence_length=config.optimizer.tokens_per_microbatch,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_percent=shape.rope.dim / shape.head_dim,
            vp_stage=stage,
            real_vocab_size=shape.vocab_size,
            temperature=config.rollout.temperature,
            noise=noise,
            fp32_head=config.precision.fp32_lm_head,
        )
        prepare_experts(chunk)
        chunk.rotary_pos_emb.inv_freq = shape.rope.frequencies(shape.max_position_embeddings)
        chunks.append(chunk.to(mesh.device))
    return chunks


def find_bad_weights(models: list[PolicyModel], config: Config) -> CheckpointError | PrecisionError | None:
    """Return the error for loaded weights of this rank that are not finite, or that float16 cannot hold, or None."""
    for model in models:
        for name, parameter in model.named_parameters():
            if torch.isfinite(parameter).all():
                continue
            where = f"'{name}' of {config.model.path}"
            if parameter.dtype == torch.float16 and not torch.isnan(parameter).any():
                return PrecisionError(
                    f"{where} has values that float16 cannot hold: set precision.train to bf16 or fp32"
                )
            return CheckpointError(f"{where} has values that are NaN or infinite: the weights are damaged, fetch them")
    return None

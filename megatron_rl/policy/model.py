"""megatron-core's GPTModel from a Hugging Face config, with a head that scores tokens instead of returning logits."""

from typing import Any

import torch
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
from megatron_rl.errors import ConfigError
from megatron_rl.policy.core_config import transformer_config
from megatron_rl.policy.expert_rules import check_experts
from megatron_rl.policy.logprobs import KEPT_BYTES, token_scores
from megatron_rl.policy.modules import block_spec, has_te_layers
from megatron_rl.policy.packing import Shard
from megatron_rl.policy.parallel import Mesh
from megatron_rl.policy.routing_replay import prepare_experts
from megatron_rl.policy.shape_rules import check_shape
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.weights.families import ModelShape
from megatron_rl.weights.layouts import padded_vocab


class PolicyModel(GPTModel):
    """GPTModel chunk whose input is a packed shard. Its last stage returns (logp, entropy[, topk]) per scored row.

    Args:
        real_vocab_size: size of the vocabulary without padding.
        temperature: the logits are divided by it.
        fp32_head: compute the logits with float32 products.
        reads_boundaries: the layers turn queries and keys by the boundaries of sequences. Else they get the angles of
            every token, which costs one gather instead of a slice for every sequence in every layer.
        noise: how the model is perturbed; None if it is not.
    """

    def __init__(
        self,
        *args: Any,
        real_vocab_size: int,
        temperature: float,
        fp32_head: bool,
        reads_boundaries: bool,
        noise: LayerNoise | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.temperature = temperature
        self.fp32_head = fp32_head
        self.reads_boundaries = reads_boundaries
        self.perturbation: LogitPerturbation | None = None
        if noise is not None and noise.logits and self.post_process:
            self.perturbation = LogitPerturbation(noise, self.config.num_layers)

    def forward(self, shard: Shard) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return hidden states for the next stage or, on the last stage, the `token_scores` of the shard's rows."""
        decoder_input, rotary, cos, sin, offset, _, *_ = self._preprocess(
            input_ids=shard.tokens, position_ids=shard.positions, packed_seq_params=shard.stream
        )
        if not self.reads_boundaries:
            rotary = rotary[:, 0].index_select(0, shard.positions[0])
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
            hidden.squeeze(1).index_select(0, shard.rows),
            weight,
            shard.labels,
            temperature=self.temperature,
            vocab_size=self.real_vocab_size,
            group=group,
            kept_bytes=0 if self.config.recompute_granularity else KEPT_BYTES[hidden.device.type],
            topk_labels_RK=shard.topk_labels,
            fp32_product=self.fp32_head,
            noise=None if draw is None or self.perturbation is None else self.perturbation.noise(draw, shard.rows),
        )


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
    check_shape(config, shape)
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
            transformer_layer_spec=block_spec(tf_config, shape, vp_stage=stage, noise=noise, plan=precision),
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
            reads_boundaries=reads_boundaries(tf_config),
        )
        prepare_experts(chunk)
        _set_frequencies(chunk, shape)
        chunks.append(chunk.to(mesh.device))
    return chunks


def reads_boundaries(config: TransformerConfig) -> bool:
    """Return whether megatron-core's layers need the boundaries of sequences for RoPE.

    Transformer Engine's kernel and latent attention read them. Without them, a packed stream has one dimension less
    than the code for interleaved dimensions expects.
    """
    return has_te_layers(config.params_dtype) or config.multi_latent_attention or config.rotary_interleaved


def _set_frequencies(chunk: PolicyModel, shape: ModelShape) -> None:
    """Give a chunk the frequencies of RoPE of its shape. With latent attention every layer has its own copy."""
    latent = shape.latent is not None
    for owner in [layer.self_attention for layer in chunk.decoder.layers] if latent else [chunk]:
        owner.rotary_pos_emb.inv_freq = shape.rope.frequencies(shape.max_position_embeddings)

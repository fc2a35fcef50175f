"""The two submodules that megatron-core's local spec lacks, and the block spec that uses them.

The stock `WrappedTorchNorm` rejects sequence parallelism. The stock `DotProductAttention` rejects packing and context
parallelism. With Transformer Engine and CUDA, Transformer Engine's own spec is used instead.
"""

import dataclasses
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.core.utils import divide

from megatron_rl.alp.layer import NoiseDraw, perturbed_spec
from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.precision.linear import quantized_layer
from megatron_rl.precision.machine import load_transformer_engine, this_machine
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.precision.products import operands_of

HAVE_TE = load_transformer_engine(this_machine())


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked: under sequence parallelism its gradient is summed over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.get_default_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class AttentionGroup:
    """Attention blocks of one shape, each with the last query aligned to the last key.

    Attributes:
        count: number of blocks.
        rows: queries per block.
        columns: keys per block.
        queries: positions in this rank's stream, shape [count x rows].
        keys: positions in the stream of keys gathered over context-parallel ranks, shape [count x columns].
        masks: window -> mask of the block, filled by `mask_of`.
    """

    count: int
    rows: int
    columns: int
    queries: torch.Tensor
    keys: torch.Tensor
    masks: dict[int | None, torch.Tensor | None] = dataclasses.field(default_factory=dict)

    def mask_of(self, window: int | None) -> torch.Tensor | None:
        """Return which keys each query sees, bool, shape [rows, columns]. None: a square block, causal, no window.

        Layers share the masks, and so do the calls of recomputation.
        """
        window = None if window is not None and window >= self.columns else window
        if window not in self.masks:
            last = self.columns - self.rows
            whole = torch.ones(self.rows, self.columns, dtype=torch.bool, device=self.queries.device).tril(last)
            plain = window is None and last == 0
            self.masks[window] = None if plain else whole if window is None else whole.triu(last - window + 1)
        return self.masks[window]


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Which queries attend to which keys, computed once per micro-batch and shared by all layers.

    Attributes:
        groups: one group, and so one batched call, per sequence length.
        inverse: index [t] that puts the concatenated outputs of the groups into stream order.
    """

    groups: tuple[AttentionGroup, ...]
    inverse: torch.Tensor


def plan_attention(cu_seqlens: list[int], cp_size: int, cp_rank: int, device: torch.device) -> AttentionPlan:
    """Return the attention plan of one rank for sequences that are split zig-zag, each on its own.

    Keys are gathered in rank order. Rank r holds chunks r and 2 cp - 1 - r of every sequence.

    Args:
        cu_seqlens: global sequence boundaries, padded to multiples of 2 x cp.
        cp_size: number of context-parallel ranks.
        cp_rank: this rank's number among them.
        device: device of the plan's tensors.
    """
    total = cu_seqlens[-1] // cp_size
    blocks: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    local = 0
    for start, stop in pairwise(cu_seqlens):
        half = (stop - start) // (2 * cp_size)
        if cp_size == 1:
            rows = torch.arange(start, stop)
            blocks.setdefault((stop - start, stop - start), []).append((rows, rows))
            continue
        owner = [(chunk, 0) if chunk < cp_size else (2 * cp_size - 1 - chunk, 1) for chunk in range(2 * cp_size)]
        keys = torch.cat([torch.arange(half) + rank * total + local + second * half for rank, second in owner])
        for second, chunk in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
            rows = torch.arange(half) + local + second * half
            blocks.setdefault((half, (chunk + 1) * half), []).append((rows, keys[: (chunk + 1) * half]))
        local += 2 * half
    groups, order = [], []
    for (rows_each, columns), members in blocks.items():
        queries, keys = (torch.cat(column) for column in zip(*members, strict=True))
        groups.append(AttentionGroup(len(members), rows_each, columns, queries.to(device), keys.to(device)))
        order.append(queries)
    return AttentionPlan(tuple(groups), torch.cat(order).argsort().to(device))


class PackedAttention(MegatronModule):
    """Causal attention over a packed (THD) stream: one SDPA call per sequence length, keys gathered over CP.

    No [T, T] mask exists. Short sequences of equal length share a call.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = groups.cp
        self.width = divide(config.kv_channels * config.num_attention_heads, groups.tp.size())
        self.scale = softmax_scale
        seen = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if seen else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return the attention output of this rank's t tokens, shape [t, heads x d].

        Args:
            query: shape [t, heads, d].
            key: shape [t, kv_heads, d].
            value: shape [t, kv_heads, d].
            attention_mask: not used.
            attn_mask_type: not used.
            attention_bias: not used.
            packed_seq_params: the `PackedStream` with the attention plan.
        """
        assert packed_seq_params is not None, "the data path is packed: every forward carries cu_seqlens"
        plan: AttentionPlan = packed_seq_params.plan
        if self.cp_group.size() > 1:
            both = gather_from_sequence_parallel_region(
                torch.stack([key, value], 1), tensor_parallel_output_grad=True, group=self.cp_group
            )
            key, value = both[:, 0], both[:, 1]
        grouped = query.shape[1] != key.shape[1]
        outputs = []
        for g in plan.groups:
            q = query.index_select(0, g.queries).unflatten(0, (g.count, g.rows)).transpose(1, 2)
            k, v = (x.index_select(0, g.keys).unflatten(0, (g.count, g.columns)).transpose(1, 2) for x in (key, value))
            mask = g.mask_of(self.window)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
            outputs.append(out.transpose(1, 2).reshape(g.count * g.rows, self.width))
        return torch.cat(outputs).index_select(0, plan.inverse)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {}


@dataclasses.dataclass
class PackedStream(PackedSeqParams):
    """megatron-core's packing parameters with what else a layer reads per micro-batch.

    Attributes:
        plan: the attention plan, computed from the packing parameters.
        noise: noise that the layers add; None: no noise.
        routing: experts of this rank's tokens in each layer, shape [t, L, K], -1 where the router chooses. None: the
            router always chooses.
    """

    plan: AttentionPlan | None = None
    noise: NoiseDraw | None = None
    routing: torch.Tensor | None = None


def block_spec(
    config: TransformerConfig,
    vp_stage: int | None = None,
    noise: LayerNoise | None = None,
    plan: PrecisionPlan | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of the block: Transformer Engine's layers with CUDA, megatron-core's local layers without.

    Args:
        config: megatron-core's configuration of the model.
        vp_stage: virtual pipeline stage of the block; None without virtual stages.
        noise: how the inputs of the layers can be perturbed; None: plain layers.
        plan: what the products of local layers are quantized to, if anything. Transformer Engine's layers take this
            from `config`.
    """
    if HAVE_TE:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        layers = block.layer_specs if noise is None else [perturbed_spec(layer, noise) for layer in block.layer_specs]
        return dataclasses.replace(block, layer_specs=layers)
    operands = None if plan is None else operands_of(plan)
    kept = frozenset() if plan is None else plan.kept
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = []
    for layer in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)):
        plain = _local_layer(config, with_experts(config, layer))
        layers.append(plain if operands is None or layer in kept else quantized_layer(plain, operands))
    if noise is not None:
        layers = [perturbed_spec(layer, noise) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def with_experts(config: TransformerConfig, layer: int) -> bool:
    """Return whether a layer (from 0) has a mixture of experts, by megatron-core's configuration."""
    frequency = config.moe_layer_freq
    return config.num_moe_experts is not None and (not isinstance(frequency, list) or bool(frequency[layer]))


def _local_layer(config: TransformerConfig, experts: bool) -> ModuleSpec:
    local = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    attention = local.submodules.self_attention
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    keys = dict(local.submodules.sharded_state_dict_keys_map)
    if experts:
        # The norm before experts has a key of its own in Transformer Engine's layers and in Megatron-LM's checkpoints.
        # megatron-core's map of local layers is for dense ones, where the norm belongs to the first product.
        del keys["pre_mlp_layernorm."]
    return ModuleSpec(
        module=local.module,
        submodules=dataclasses.replace(
            local.submodules,
            input_layernorm=RMSNorm,
            pre_mlp_layernorm=RMSNorm,
            sharded_state_dict_keys_map=keys,
            self_attention=ModuleSpec(
                module=attention.module,
                params=attention.params,
                submodules=dataclasses.replace(attention.submodules, core_attention=PackedAttention, **norms),
            ),
        ),
    )

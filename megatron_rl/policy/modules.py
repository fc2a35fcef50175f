"""The two submodules megatron-core's local spec lacks, and the block spec that uses them.

Stock `WrappedTorchNorm` refuses sequence parallelizm and stock `DotProductAttention` refuses packing and
context parallelizm. With Transformer Engine and CUDA its own spec is used instead.
"""

import dataclasses
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import divide

from megatron_rl.alp.layer import Draw, perturbed
from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.precision.linear import quantized_layer
from megatron_rl.precision.machine import load_transformer_engine, this_machine
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.precision.products import operands_of

HAVE_TE = load_transformer_engine(this_machine())


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight says that its gradient must be summed over tensor-parallel ranks under SP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.get_default_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class AttentionGroup:
    """Blocks of one shape: `count` times `rows` queries that attend to `columns` keys, the last rows aligned.

    queries [count x rows]: positions in this rank's stream. keys [count x columns]: positions in the stream of keys,
    gathered over context-parallel ranks. mask [rows, columns] where the block is not square, else None (causal).
    """

    count: int
    rows: int
    columns: int
    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Who attends to whom, worked out once per micro-batch and shared by all layers.

    Sequences of equal length are one group and one batched call. inverse [t]: brings the groups' outputs, one after
    the other, back to stream order.
    """

    groups: tuple[AttentionGroup, ...]
    inverse: torch.Tensor


def plan_attention(cu_seqlens: list[int], cp_size: int, cp_rank: int, device: torch.device) -> AttentionPlan:
    """Plan for sequences `cu_seqlens` (global, padded to multiples of 2 x cp), split zig-zag per sequence.

    Keys arrive rank after rank; rank r holds chunks r and 2 cp - 1 - r of every sequence.
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
        square = rows_each == columns
        mask = (
            None
            if square
            else torch.ones(rows_each, columns, dtype=torch.bool, device=device).tril(columns - rows_each)
        )
        groups.append(AttentionGroup(len(members), rows_each, columns, queries.to(device), keys.to(device), mask))
        order.append(queries)
    return AttentionPlan(tuple(groups), torch.cat(order).argsort().to(device))


class PackedAttention(MegatronModule):
    """Causal attention over a packed (THD) stream: one SDPA call per sequence length, keys gathered over CP.

    No [T, T] mask exists, and short sequences of equal length share a call.
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
        """query [t, heads, d], key and value [t, kv_heads, d] -> [t, heads x d]; t is this rank's token slice."""
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
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=g.mask, is_causal=g.mask is None, scale=self.scale, enable_gqa=grouped
            )
            outputs.append(out.transpose(1, 2).reshape(g.count * g.rows, self.width))
        return torch.cat(outputs).index_select(0, plan.inverse)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {}


@dataclasses.dataclass
class PackedStream(PackedSeqParams):
    """megatron-core's packing parameters, the attention plan made from them, and the noise that layers add, if any.

    routing [t, L, K]: experts to route this rank's tokens to in each layer, -1 where the router chooses; None: it always does.
    """

    plan: AttentionPlan | None = None
    noise: Draw | None = None
    routing: torch.Tensor | None = None


def block_spec(
    config: TransformerConfig,
    vp_stage: int | None = None,
    noise: LayerNoise | None = None,
    plan: PrecisionPlan | None = None,
) -> TransformerBlockSubmodules | ModuleSpec:
    """The transformer block: Transformer Engine's layers with CUDA, megatron-core's local ones without.

    noise: how the inputs of its layers can be perturbed; None for plain layers. plan: what the products of local layers
    are quantized to, if anything; Transformer Engine's layers have that from `config`.
    """
    if HAVE_TE:
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        return layer if noise is None else perturbed(layer, noise)
    plain = _local_layer(config)
    operands = None if plan is None else operands_of(plan)
    low = plain if operands is None else quantized_layer(plain, operands)
    kept = frozenset() if plan is None else plan.kept
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = [plain if first + n in kept else low for n in range(get_num_layers_to_build(config, vp_stage=vp_stage))]
    if noise is not None:
        layers = [perturbed(layer, noise) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    local = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    attention = local.submodules.self_attention
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    return ModuleSpec(
        module=local.module,
        submodules=dataclasses.replace(
            local.submodules,
            input_layernorm=RMSNorm,
            pre_mlp_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=attention.module,
                params=attention.params,
                submodules=dataclasses.replace(attention.submodules, core_attention=PackedAttention, **norms),
            ),
        ),
    )

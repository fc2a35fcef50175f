"""The two submodules megatron-core's local spec lacks, and the block spec that uses them.

Stock `WrappedTorchNorm` refuses sequence parallelism and stock `DotProductAttention` refuses packing and
context parallelism. With Transformer Engine and CUDA its own spec is used instead.
"""

import dataclasses
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide

try:
    import transformer_engine.pytorch  # noqa: F401

    HAVE_TE = torch.cuda.is_available()
except ImportError:
    HAVE_TE = False


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight says that its gradient must be summed over tensor-parallel ranks under SP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.get_default_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Which query rows attend to which key rows, worked out once per micro-batch and shared by all layers.

    blocks: (query start, stop, key start, stop); queries in this rank's stream, keys in the natural order of
    the whole stream. order: permutation that brings keys gathered over context-parallel ranks to that order.
    """

    blocks: tuple[tuple[int, int, int, int], ...]
    order: torch.Tensor | None


def plan_attention(cu_seqlens: list[int], cp_size: int, cp_rank: int, device: torch.device) -> AttentionPlan:
    """Plan for sequences `cu_seqlens` (global, padded to multiples of 2 x cp), split zig-zag per sequence."""
    bounds = list(pairwise(cu_seqlens))
    if cp_size == 1:
        return AttentionPlan(tuple((a, b, a, b) for a, b in bounds), None)
    blocks, order = [], torch.empty(cu_seqlens[-1], dtype=torch.long)
    local_total, local = cu_seqlens[-1] // cp_size, 0
    for start, stop in bounds:
        half = (stop - start) // (2 * cp_size)
        for j, chunk in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
            blocks.append((local + j * half, local + (j + 1) * half, start, start + (chunk + 1) * half))
        for rank in range(cp_size):
            for j, chunk in enumerate((rank, 2 * cp_size - 1 - rank)):
                at = rank * local_total + local + j * half
                order[start + chunk * half : start + (chunk + 1) * half] = torch.arange(at, at + half)
        local += 2 * half
    return AttentionPlan(tuple(blocks), order.to(device))


class PackedAttention(MegatronModule):
    """Causal attention over a packed (THD) stream, one SDPA call per sequence, keys gathered over CP.

    A loop over sequences needs no [T, T] mask; on CPU it is about 8x faster than one.
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
        if plan.order is not None:
            both = gather_from_sequence_parallel_region(
                torch.stack([key, value], 1), tensor_parallel_output_grad=True, group=self.cp_group
            ).index_select(0, plan.order)
            key, value = both[:, 0], both[:, 1]
        grouped = query.shape[1] != key.shape[1]
        pieces = []
        for q_start, q_stop, k_start, k_stop in plan.blocks:
            q = query[q_start:q_stop].transpose(0, 1)[None]
            k, v = (x[k_start:k_stop].transpose(0, 1)[None] for x in (key, value))
            rows, columns = q_stop - q_start, k_stop - k_start
            mask = None
            if rows != columns:
                mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
            pieces.append(out[0].transpose(0, 1).reshape(rows, self.width))
        return torch.cat(pieces)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return {}


@dataclasses.dataclass
class PackedStream(PackedSeqParams):
    """megatron-core's packing parameters, and the attention plan made from them."""

    plan: AttentionPlan | None = None


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules | ModuleSpec:
    """The transformer block: Transformer Engine's layers with CUDA, megatron-core's local ones without."""
    if HAVE_TE:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    local = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    attention = local.submodules.self_attention
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    layer = ModuleSpec(
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
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)

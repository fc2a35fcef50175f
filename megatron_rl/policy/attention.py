"""Attention over a packed stream for megatron-core's local layers, and the plan of a micro-batch that it follows.

The stock `DotProductAttention` rejects packing and context parallelism.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide

from megatron_rl.alp.layer import NoiseDraw
from megatron_rl.policy.device_copy import on_device


@dataclasses.dataclass(frozen=True)
class AttentionGroup:
    """Attention blocks of one shape, each with the last query aligned to the last key.

    Attributes:
        count: number of blocks.
        rows: queries per block.
        columns: keys per block.
        queries: positions in this rank's stream, shape [count x rows]. None: the block follows the group before it.
        keys: positions in the stream of keys gathered over context-parallel ranks, shape [count x columns]. None: those
            of the queries.
        masks: (window, sinks) -> mask of the block, filled by `mask_of`.
    """

    count: int
    rows: int
    columns: int
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    masks: dict[tuple[int | None, bool], torch.Tensor] = dataclasses.field(default_factory=dict)

    def mask_of(self, window: int | None, sinks: bool, device: torch.device) -> torch.Tensor | None:
        """Return which keys each query sees. Layers share the masks, and so do the calls of recomputation.

        Args:
            window: number of keys that a query sees, its own included; None: all before it.
            sinks: one more column follows, which every query sees.
            device: device of the mask.

        Returns:
            bool, shape [rows, columns], or None for a square block that is causal and has no window.
        """
        window = None if window is not None and window >= self.columns else window
        if (window, sinks) not in self.masks:
            last = self.columns - self.rows
            if window is None and last == 0 and not sinks:
                return None
            mask = torch.ones(self.rows, self.columns, dtype=torch.bool, device=device).tril(last)
            mask = mask if window is None else mask.triu(last - window + 1)
            self.masks[window, sinks] = F.pad(mask, (0, int(sinks)), value=True)
        return self.masks[window, sinks]


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Which queries attend to which keys, computed once per micro-batch and shared by all layers.

    Attributes:
        groups: one batched call each. Without context parallelism, one for each run of sequences of one length.
        inverse: index [t] that puts the concatenated outputs of the groups into stream order; None: they are.
    """

    groups: tuple[AttentionGroup, ...]
    inverse: torch.Tensor | None = None

    def parts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield the queries [count x rows, ...], keys and values [count x columns, ...] of each group."""
        if self.inverse is None:
            sizes = [group.count * group.rows for group in self.groups]
            yield from zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
            return
        for group in self.groups:
            assert group.queries is not None and group.keys is not None
            keys = group.keys
            yield query.index_select(0, group.queries), key.index_select(0, keys), value.index_select(0, keys)


def plan_attention(cu_seqlens: list[int], cp_size: int, cp_rank: int) -> AttentionPlan:
    """Return the attention plan of one rank, on the host, for sequences that are split zig-zag, each on its own.

    Keys are gathered in rank order. Rank r holds chunks r and 2 cp - 1 - r of every sequence. Packing puts sequences of
    one length side by side, so without context parallelism every group is a slice of the stream.

    Args:
        cu_seqlens: global sequence boundaries, padded to multiples of 2 x cp.
        cp_size: number of context-parallel ranks.
        cp_rank: this rank's number among them.
    """
    cu = np.asarray(cu_seqlens)
    lengths, total = np.diff(cu), cu[-1] // cp_size
    groups: list[AttentionGroup] = []
    if cp_size == 1:
        for run in np.split(lengths, np.flatnonzero(np.diff(lengths)) + 1):
            groups.append(AttentionGroup(len(run), int(run[0]), int(run[0])))
        return AttentionPlan(tuple(groups))
    queries: list[torch.Tensor] = []

    def add(rows: np.ndarray, keys: np.ndarray) -> None:
        """Add the blocks with these queries, shape [count, rows], and keys, shape [count, columns]."""
        queries.append(torch.from_numpy(rows.reshape(-1)))
        gathered = torch.from_numpy(keys.reshape(-1))
        groups.append(AttentionGroup(len(rows), rows.shape[1], keys.shape[1], queries[-1], gathered))

    for length in np.unique(lengths):
        starts = cu[:-1][lengths == length]
        half = length // (2 * cp_size)
        own, inside = starts // cp_size, np.arange(half)
        owner = [(chunk, 0) if chunk < cp_size else (2 * cp_size - 1 - chunk, 1) for chunk in range(2 * cp_size)]
        firsts = np.stack([rank * total + own + second * half for rank, second in owner], axis=1)
        keys = (firsts[:, :, None] + inside).reshape(len(starts), -1)
        for second, chunk in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
            add(own[:, None] + second * half + inside, keys[:, : (chunk + 1) * half])
    return AttentionPlan(tuple(groups), torch.cat(queries).argsort())


class PackedAttention(MegatronModule):
    """Causal attention over a packed (THD) stream: one SDPA call per group of the plan, keys gathered over CP.

    No [T, T] mask exists. Short sequences of equal length share a call. Values may be narrower or wider than keys.

    A model with sinks has one logit per head, `softmax_offset`, that takes part in every softmax and carries no value.
    It is the score of one more key: the product of two (or one, in fp32) more dimensions of queries and keys. So the
    kernels of plain attention are used, and they differentiate it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = groups.cp
        self.tp_group = groups.tp
        self.scale = softmax_scale or (k_channels or config.kv_channels) ** -0.5
        seen = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if seen else None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = divide(config.num_attention_heads, groups.tp.size())
            device = torch.get_default_device()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

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
        """Return the attention output of this rank's t tokens, shape [t, heads x v].

        Args:
            query: shape [t, heads, d].
            key: shape [t, kv_heads, d].
            value: shape [t, kv_heads, v].
            attention_mask: not used.
            attn_mask_type: not used.
            attention_bias: not used.
            packed_seq_params: the `PackedStream` with the attention plan.
        """
        assert packed_seq_params is not None, "the data path is packed: every forward carries a stream"
        plan: AttentionPlan = packed_seq_params.plan(query.device)
        if self.cp_group.size() > 1:
            both = gather_from_sequence_parallel_region(
                torch.cat([key, value], -1), tensor_parallel_output_grad=True, group=self.cp_group
            )
            key, value = both.split([key.shape[-1], value.shape[-1]], -1)
        sinks = self.softmax_offset is not None
        if self.softmax_offset is not None:
            query = torch.cat([query, self._sink_scores(query)], -1)
            added = query.shape[-1] - key.shape[-1]
            key = F.pad(key, (0, added))
        grouped = query.shape[1] != key.shape[1]
        outputs = []
        for g, (q_part, *kv_parts) in zip(plan.groups, plan.parts(query, key, value), strict=True):
            q = q_part.unflatten(0, (g.count, g.rows)).transpose(1, 2)
            k, v = (part.unflatten(0, (g.count, g.columns)).transpose(1, 2) for part in kv_parts)
            if sinks:
                k, v = _with_sink(k, added), F.pad(v, (0, 0, 0, 1))
            mask = g.mask_of(self.window, sinks, query.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
            outputs.append(out.transpose(1, 2).reshape(g.count * g.rows, -1))
        output = torch.cat(outputs)
        return output if plan.inverse is None else output.index_select(0, plan.inverse)

    def _sink_scores(self, query: torch.Tensor) -> torch.Tensor:
        """Return the further dimensions of queries, shape [t, heads, n], whose scaled sum is each head's sink.

        In 16 bits one dimension would round the sink again. A second one holds what the first one lacks.
        """
        assert self.softmax_offset is not None
        wanted = self.softmax_offset.float() / self.scale
        first = wanted.to(query.dtype)
        parts = [first] if query.dtype == torch.float32 else [first, (wanted - first.float()).to(query.dtype)]
        return torch.stack(parts, -1).expand(len(query), -1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        held = {} if self.softmax_offset is None else {"softmax_offset": self.softmax_offset}
        shared: dict = make_sharded_tensors_for_checkpoint(
            held,
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return shared


def _with_sink(keys: torch.Tensor, added: int) -> torch.Tensor:
    """Return keys [n, kv_heads, columns, d] with one more: 1 in the last `added` dimensions, and 0 elsewhere."""
    sink = keys.new_zeros(keys.shape[-1])
    sink[-added:] = 1
    return torch.cat([keys, sink.expand(*keys.shape[:2], 1, -1)], 2)


@dataclasses.dataclass
class PackedStream(PackedSeqParams):
    """megatron-core's packing parameters with what else a layer reads per micro-batch.

    Attributes:
        make_plan: makes the attention plan. Only local layers ask for it: Transformer Engine's need none.
        noise: noise that the layers add; None: no noise.
        routing: experts of this rank's tokens in each layer, shape [t, L, K], -1 where the router chooses. None: the
            router always chooses.
    """

    make_plan: Callable[[], AttentionPlan] | None = None
    noise: NoiseDraw | None = None
    routing: torch.Tensor | None = None
    _plan: AttentionPlan | None = None

    def plan(self, device: torch.device) -> AttentionPlan:
        """Return the attention plan, on the device of all layers. It is made at the first call."""
        if self._plan is None:
            assert self.make_plan is not None
            self._plan = on_device(self.make_plan(), device)
        return self._plan

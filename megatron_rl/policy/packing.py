"""From a batch of trajectories to packed micro-batches of one constant length.

A micro-batch is one stream of `tokens_per_microbatch` positions. Position t *predicts* the next token, so every
per-token column is shifted by one against the batch: labels[t] = tokens[t + 1] inside a trajectory, and mask,
logmu, ... at t speak of that label. The last token of a trajectory and all padding predict nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_rl.errors import UserError
from megatron_rl.policy.modules import PackedStream, plan_attention
from megatron_rl.types import Batch

PADDING_SEGMENT = 128  # padding is cut into short sequences: attention over one long one would be wasted quadratically


@dataclass(frozen=True)
class Microbatch:
    """One packed stream, whole (not cut over context parallel). All tensors [T].

    tokens, labels, positions int64; seq_ids int64, the row of the trajectory in its batch, -1 on padding;
    source int64, the flat index in the batch of the label, -1 where nothing is predicted; mask, advantages,
    logmu, logold, logref float32 (None when the batch has none). cu_seqlens: host list, multiples of the alignment.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    seq_ids: torch.Tensor
    source: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    cu_seqlens: list[int]
    logmu: torch.Tensor | None = None
    logold: torch.Tensor | None = None
    logref: torch.Tensor | None = None


@dataclass(frozen=True)
class Shard:
    """What one rank feeds its model: its context-parallel slice of a micro-batch.

    tokens, positions [1, T / cp]; rows [R]: local positions whose next token is scored; labels [R]: those
    tokens; index [R]: the same positions in the whole stream.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    stream: PackedStream


def pack(batch: Batch, *, budget: int, align: int, multiple: int) -> list[Microbatch]:
    """First-fit-decreasing packing into streams of `budget` tokens.

    Every trajectory is padded to a multiple of `align` (2 x cp under context parallelism); the number of
    micro-batches is a multiple of `multiple` (ranks that share the work), empty ones filling up.
    Raises UserError when a trajectory is longer than the budget.
    """
    padded = -(-batch.lengths // align) * align
    too_long = np.flatnonzero(padded > budget)
    if len(too_long):
        raise UserError(
            f"trajectory {batch.ids[too_long[0]]} has {batch.lengths[too_long[0]]} tokens, more than "
            f"optimizer.tokens_per_microbatch = {budget}"
        )
    bins: list[list[int]] = []
    room: list[int] = []
    for row in np.argsort(-padded, kind="stable"):
        place = next((i for i, free in enumerate(room) if free >= padded[row]), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(int(row))
        room[place] -= int(padded[row])
    bins += [[] for _ in range(-len(bins) % multiple)]
    return [_stream(batch, rows, padded, budget, align) for rows in bins]


def _stream(batch: Batch, rows: list[int], padded: np.ndarray, budget: int, align: int) -> Microbatch:
    used = int(padded[rows].sum()) if rows else 0
    segment = -(-PADDING_SEGMENT // align) * align
    padding = [min(segment, budget - at) for at in range(used, budget, segment)]
    cu = np.concatenate([[0], np.cumsum([*padded[rows], *padding])]).astype(np.int64)
    seq = np.repeat(np.arange(len(cu) - 1), np.diff(cu))
    positions = np.arange(budget) - cu[seq]
    length = np.zeros(len(cu) - 1, dtype=np.int64)
    length[: len(rows)] = batch.lengths[rows]
    start = np.zeros(len(cu) - 1, dtype=np.int64)
    start[: len(rows)] = batch.cu_seqlens[rows]
    flat = start[seq] + positions  # index in the batch of the token at each position
    real = positions < length[seq]
    predicts = positions < length[seq] - 1

    def shifted(column: np.ndarray | None) -> torch.Tensor | None:
        if column is None:
            return None
        out = np.zeros(budget, dtype=np.float32)
        out[predicts] = column[flat[predicts] + 1]
        return torch.from_numpy(out)

    tokens = np.zeros(budget, dtype=np.int64)
    tokens[real] = batch.tokens[flat[real]]
    source = np.where(predicts, flat + 1, -1)
    labels = np.zeros(budget, dtype=np.int64)
    labels[predicts] = batch.tokens[source[predicts]]
    row_ids = np.full(len(cu) - 1, -1, dtype=np.int64)
    row_ids[: len(rows)] = rows
    seq_ids = np.where(real, row_ids[seq], -1)
    advantages = np.where(real, batch.advantages[np.maximum(seq_ids, 0)] if len(batch) else 0, 0).astype(np.float32)
    mask = shifted(batch.mask)
    assert mask is not None
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        seq_ids=torch.from_numpy(seq_ids),
        source=torch.from_numpy(source),
        mask=mask,
        advantages=torch.from_numpy(advantages),
        cu_seqlens=cu.tolist(),
        logmu=shifted(batch.logmu),
        logold=shifted(batch.logold),
        logref=shifted(batch.logref),
    )


def zigzag_index(cu_seqlens: list[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Positions of the stream held by one context-parallel rank: chunks r and 2 cp - 1 - r of EVERY sequence.

    A zig-zag over the whole stream instead is silently wrong: keys of other sequences would be taken.
    """
    if cp_size == 1:
        return torch.arange(cu_seqlens[-1])
    cu = np.asarray(cu_seqlens)
    seq = np.repeat(np.arange(len(cu) - 1), np.diff(cu))
    chunk = (np.arange(cu[-1]) - cu[seq]) // (np.diff(cu) // (2 * cp_size))[seq]
    return torch.from_numpy(np.flatnonzero((chunk == cp_rank) | (chunk == 2 * cp_size - 1 - cp_rank)))


def shard(micro: Microbatch, *, cp_size: int, cp_rank: int, device: torch.device, max_length: int) -> Shard:
    """This rank's slice. max_length: one constant for the run (megatron-core caches RoPE by it)."""
    index = zigzag_index(micro.cu_seqlens, cp_size, cp_rank)
    scored = micro.mask[index] > 0
    cu = torch.tensor(micro.cu_seqlens, dtype=torch.int32, device=device)
    stream = PackedStream(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        cu_seqlens_q_padded=cu,
        cu_seqlens_kv_padded=cu,
        max_seqlen_q=max_length,
        max_seqlen_kv=max_length,
        plan=plan_attention(micro.cu_seqlens, cp_size, cp_rank, device),
    )
    return Shard(
        tokens=micro.tokens[index][None].to(device),
        positions=micro.positions[index][None].to(device),
        rows=scored.nonzero()[:, 0].to(device),
        labels=micro.labels[index[scored]].to(device),
        index=index[scored].to(device),
        stream=stream,
    )


def to_device(micro: Microbatch, device: torch.device) -> Microbatch:
    """The same micro-batch with its columns on the device the objective runs on."""
    moved: dict[str, Any] = {name: value.to(device) for name, value in vars(micro).items() if isinstance(value, torch.Tensor)}
    return replace(micro, **moved)

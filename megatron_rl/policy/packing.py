"""Packing: a batch of trajectories becomes micro-batches of one constant length.

A micro-batch is one stream of `tokens_per_microbatch` positions. Position t *predicts* the next token, so every
per-token column is shifted by one against the batch: labels[t] = tokens[t + 1] inside a trajectory, and mask,
logmu, ... at t belong to that label. The last token of a trajectory and all padding predict nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megatron_rl.alp.noise import NoiseRows
from megatron_rl.errors import UserError
from megatron_rl.policy.modules import PackedStream, plan_attention
from megatron_rl.types import Batch

PADDING_SEGMENT = 128  # padding is cut into short sequences: the attention cost of a long one is quadratic


@dataclass(frozen=True)
class Microbatch:
    """One packed stream, whole (not split over context parallel).

    Tensors have shape [T], except topk_* [T, K] and routing [T, L, K]. Optional columns are None if the batch has none.

    Attributes:
        tokens: int64.
        labels: int64, the next tokens.
        positions: int64, positions in the sequence.
        seq_ids: int64, row of the trajectory in its batch, -1 on padding.
        ids: int64, id of the trajectory in the run, -1 on padding.
        source: int64, flat index of the label in the batch, -1 where nothing is predicted.
        mask: float32.
        advantages: float32, the batch's token_advantages if it has them, else the trajectory's advantage on each of its
            tokens.
        rewards: float32, the trajectory's reward on each of its tokens.
        cu_seqlens: host list of sequence boundaries, multiples of the alignment.
        logmu: float32.
        logold: float32.
        logref: float32.
        staleness: float32.
        topk_ids: int64.
        topk_logmu: float32.
        routing: int32, experts of the token at its own position, -1 where none are given and on padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    seq_ids: torch.Tensor
    ids: torch.Tensor
    source: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    rewards: torch.Tensor
    cu_seqlens: list[int]
    logmu: torch.Tensor | None = None
    logold: torch.Tensor | None = None
    logref: torch.Tensor | None = None
    staleness: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None
    topk_logmu: torch.Tensor | None = None
    routing: torch.Tensor | None = None


@dataclass(frozen=True)
class Shard:
    """Input of the model on one rank: the rank's context-parallel slice of a micro-batch.

    Attributes:
        tokens: shape [1, T / cp].
        positions: shape [1, T / cp].
        rows: local positions whose next token is scored, shape [R].
        labels: these next tokens, shape [R].
        index: the same positions in the whole stream, shape [R].
        stream: packing parameters, attention plan, noise and routing.
        topk_labels: further tokens to score at these positions, shape [R, K].
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    stream: PackedStream
    topk_labels: torch.Tensor | None = None


def pack(batch: Batch, *, budget: int, align: int, multiple: int) -> list[Microbatch]:
    """Pack trajectories into streams of `budget` tokens by first-fit decreasing.

    Args:
        batch: the trajectories.
        budget: length of a stream, in tokens.
        align: every trajectory is padded to a multiple of it (2 x cp under context parallelism).
        multiple: the number of micro-batches is a multiple of it (ranks that share the work). Empty micro-batches are
            added as needed.

    Raises:
        UserError: a trajectory is longer than the budget.
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
    flat = start[seq] + positions  # flat index in the batch of the token at each position
    real = positions < length[seq]
    predicts = positions < length[seq] - 1

    def shifted(column: np.ndarray, dtype: type = np.float32) -> torch.Tensor:
        out = np.zeros((budget, *column.shape[1:]), dtype=dtype)
        out[predicts] = column[flat[predicts] + 1]
        return torch.from_numpy(out)

    def if_any(column: np.ndarray | None, dtype: type = np.float32) -> torch.Tensor | None:
        return None if column is None else shifted(column, dtype)

    routing = None
    if batch.routing is not None:
        routing = np.full((budget, *batch.routing.shape[1:]), -1, dtype=np.int32)
        routing[real] = batch.routing[flat[real]]
    tokens = np.zeros(budget, dtype=np.int64)
    tokens[real] = batch.tokens[flat[real]]
    source = np.where(predicts, flat + 1, -1)
    labels = np.zeros(budget, dtype=np.int64)
    labels[predicts] = batch.tokens[source[predicts]]
    row_ids = np.full(len(cu) - 1, -1, dtype=np.int64)
    row_ids[: len(rows)] = rows
    seq_ids = np.where(real, row_ids[seq], -1)

    def spread(per_trajectory: np.ndarray) -> torch.Tensor:
        values = per_trajectory[np.maximum(seq_ids, 0)] if len(batch) else 0
        return torch.from_numpy(np.where(real, values, 0).astype(np.float32))

    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        seq_ids=torch.from_numpy(seq_ids),
        ids=torch.from_numpy(np.where(real, batch.ids[np.maximum(seq_ids, 0)], -1) if len(batch) else seq_ids),
        source=torch.from_numpy(source),
        mask=shifted(batch.mask),
        advantages=spread(batch.advantages) if batch.token_advantages is None else shifted(batch.token_advantages),
        rewards=spread(batch.rewards),
        cu_seqlens=cu.tolist(),
        logmu=if_any(batch.logmu),
        logold=if_any(batch.logold),
        logref=if_any(batch.logref),
        staleness=if_any(batch.staleness),
        topk_ids=if_any(batch.topk_ids, np.int64),
        topk_logmu=if_any(batch.topk_logmu),
        routing=None if routing is None else torch.from_numpy(routing),
    )


def zigzag_index(cu_seqlens: list[int], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the stream positions that one context-parallel rank holds: chunks r and 2 cp - 1 - r of EVERY sequence.

    A zig-zag over the whole stream would be silently wrong, because it would use keys of other sequences.

    Args:
        cu_seqlens: sequence boundaries, multiples of 2 x cp.
        cp_size: number of context-parallel ranks.
        cp_rank: this rank's number r among them.
    """
    if cp_size == 1:
        return torch.arange(cu_seqlens[-1])
    cu = np.asarray(cu_seqlens)
    seq = np.repeat(np.arange(len(cu) - 1), np.diff(cu))
    chunk = (np.arange(cu[-1]) - cu[seq]) // (np.diff(cu) // (2 * cp_size))[seq]
    return torch.from_numpy(np.flatnonzero((chunk == cp_rank) | (chunk == 2 * cp_size - 1 - cp_rank)))


def local_positions(micro: Microbatch, *, cp_size: int, cp_rank: int, sp_size: int, sp_rank: int) -> torch.Tensor:
    """Return the stream positions whose hidden states this rank holds.

    They are the sequence-parallel part of the rank's context-parallel slice.

    Args:
        micro: the whole micro-batch.
        cp_size: number of context-parallel ranks.
        cp_rank: this rank's number among them.
        sp_size: number of ranks that split the slice, 1 without sequence parallelism.
        sp_rank: this rank's number among them.
    """
    return zigzag_index(micro.cu_seqlens, cp_size, cp_rank).view(sp_size, -1)[sp_rank]


def noise_rows(micro: Microbatch, *, cp_size: int, cp_rank: int, sp_size: int, sp_rank: int) -> NoiseRows:
    """Return the positions and trajectory ids of the tokens of `local_positions`, which has the same arguments."""
    own = local_positions(micro, cp_size=cp_size, cp_rank=cp_rank, sp_size=sp_size, sp_rank=sp_rank)
    return NoiseRows(micro.positions[own], micro.ids[own])


def shard(micro: Microbatch, *, cp_size: int, cp_rank: int, device: torch.device, max_length: int) -> Shard:
    """Return this rank's slice of a micro-batch.

    Args:
        micro: the whole micro-batch.
        cp_size: number of context-parallel ranks.
        cp_rank: this rank's number among them.
        device: device of the slice's tensors.
        max_length: maximum sequence length, one constant for the run, because megatron-core caches RoPE by it.
    """
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
        topk_labels=None if micro.topk_ids is None else micro.topk_ids[index[scored]].to(device),
    )


def to_device(micro: Microbatch, device: torch.device) -> Microbatch:
    """Return the same micro-batch with its columns on `device`, where the objective runs."""
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(micro).items() if isinstance(value, torch.Tensor)
    }
    return replace(micro, **moved)

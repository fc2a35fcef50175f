"""Packing: a share of trajectories becomes micro-batches of one length.

A micro-batch is one stream of at most `tokens_per_microbatch` positions. The streams of a batch are as short as its
fullest one allows, because padding is computed like any token. Position t *predicts* the next token, so the per-token
columns are shifted by one against the batch, unless they are about the token as an input: labels[t] = tokens[t + 1]
inside a trajectory, and mask, logmu, ... at t belong to that label. The last token of a trajectory and all padding
predict nothing.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from megatron_rl.alp.noise import NoiseRows
from megatron_rl.policy.attention import PackedStream, plan_attention
from megatron_rl.policy.shares import Share
from megatron_rl.precision.plan_checks import BLOCK
from megatron_rl.types import COLUMNS, Column

# Lengths of streams are multiples of it where the budget is. On a CPU every position costs. On CUDA few shapes let the
# allocator use its blocks again.
LENGTH_STEP = {"cpu": 128, "cuda": 1024}
PADDING_SEGMENT = 128  # padding is cut into short sequences: the attention cost of a long one is quadratic


@dataclass(frozen=True)
class Microbatch:
    """One packed stream of T positions, whole (not split over context parallel).

    Attributes:
        tokens: [T] int64.
        labels: [T] int64, the next tokens.
        positions: [T] int64, positions in the sequence.
        seq_ids: [T] int64, row of the trajectory in the whole batch, -1 on padding.
        ids: [T] int64, id of the trajectory in the run, -1 on padding.
        source: [T] int64, flat index of the label in the whole batch, -1 where nothing is predicted.
        cu_seqlens: host list of sequence boundaries, multiples of the alignment.
        columns: the batch's columns that are packed, [T, ...]; see `types.COLUMNS`. A per-trajectory column has the
            trajectory's entry on each of its tokens. `advantages` are the batch's token_advantages if it has them.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    seq_ids: torch.Tensor
    ids: torch.Tensor
    source: torch.Tensor
    cu_seqlens: list[int]
    columns: dict[str, torch.Tensor]

    @property
    def mask(self) -> torch.Tensor:
        """[T] float32, 1 where a trained token is predicted."""
        return self.columns["mask"]


@dataclass(frozen=True)
class Shard:
    """Input of the model on one rank: the rank's context-parallel slice of a micro-batch.

    Attributes:
        tokens: shape [1, T / cp].
        positions: shape [1, T / cp].
        rows: local positions whose next token is scored, shape [R].
        labels: these next tokens, shape [R].
        index: the same positions in the whole stream, shape [R].
        stream: packing parameters, how to plan attention, noise and routing.
        topk_labels: further tokens to score at these positions, shape [R, K].
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    stream: PackedStream
    topk_labels: torch.Tensor | None = None


def stream_unit(budget: int, tensor: int, context: int, device: str) -> int:
    """Return what the length of a stream is a multiple of. It divides the budget.

    Every rank has an equal part of a stream. On a GPU it is as divisible by 2 as a rank's part of the budget, up to
    blocks of 128 tokens, so that the checks of the budget hold for every stream. Layouts of 1, 2, 4 and 8 ranks have
    the same unit: streams and their padding do not depend on them.

    Args:
        budget: most tokens of a stream, a multiple of 2 x context x tensor.
        tensor: number of tensor-parallel ranks.
        context: number of context-parallel ranks.
        device: cpu or cuda.
    """
    ranks = context * tensor
    blocks = math.gcd(budget, BLOCK * ranks) if device == "cuda" else 1
    return math.lcm(math.gcd(budget, LENGTH_STEP[device]), blocks, 2 * ranks)


def pack(share: Share) -> list[Microbatch]:
    """Return the micro-batches of a share."""
    return [_stream(share, rows) for rows in share.streams]


def _stream(share: Share, rows: list[int]) -> Microbatch:
    batch, size, align = share.batch, share.length, share.align
    padded = -(-batch.lengths[rows] // align) * align if rows else np.zeros(0, dtype=np.int64)
    segment = -(-PADDING_SEGMENT // align) * align
    padding = [min(segment, size - at) for at in range(int(padded.sum()), size, segment)]
    cu = np.concatenate([[0], np.cumsum([*padded, *padding])]).astype(np.int64)
    seq = np.repeat(np.arange(len(cu) - 1), np.diff(cu))
    positions = np.arange(size) - cu[seq]

    def of_sequences(values: np.ndarray, padding: int = 0) -> np.ndarray:
        """Return an entry for each position, from one for each row of the share."""
        own = np.full(len(cu) - 1, padding, dtype=np.int64)
        own[: len(rows)] = values[rows]
        return own[seq]

    length, start = of_sequences(batch.lengths), of_sequences(batch.cu_seqlens[:-1])
    flat = start + positions  # index in the share of the token at each position
    real = positions < length
    predicts = positions < length - 1

    tokens = np.zeros(size, dtype=np.int64)
    tokens[real] = batch.tokens[flat[real]]
    labels = np.zeros(size, dtype=np.int64)
    labels[predicts] = batch.tokens[flat[predicts] + 1]
    source = np.where(predicts, of_sequences(share.starts) + positions + 1, -1)
    row = of_sequences(np.arange(len(batch)))

    def packed(column: Column, values: np.ndarray) -> torch.Tensor:
        if not column.per_token:
            spread = values[row] if len(batch) else column.fill
            return torch.from_numpy(np.where(real, spread, column.fill).astype(column.dtype))
        out = np.full((size, *values.shape[1:]), column.fill, dtype=column.packed_dtype or column.dtype)
        if column.packed == "label":
            out[predicts] = values[flat[predicts] + 1]
        else:
            out[real] = values[flat[real]]
        return torch.from_numpy(out)

    columns = {name: packed(COLUMNS[name], values) for name, values in batch.columns.items() if COLUMNS[name].packed}
    columns["advantages"] = columns.pop("token_advantages", columns["advantages"])
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        seq_ids=torch.from_numpy(np.where(real, of_sequences(share.rows, -1), -1)),
        ids=torch.from_numpy(np.where(real, of_sequences(batch.ids, -1), -1)),
        source=torch.from_numpy(source),
        cu_seqlens=cu.tolist(),
        columns=columns,
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


def shard(micro: Microbatch, *, cp_size: int, cp_rank: int, max_length: int, boundaries: bool = True) -> Shard:
    """Return this rank's slice of a micro-batch, on the host.

    Args:
        micro: the whole micro-batch.
        cp_size: number of context-parallel ranks.
        cp_rank: this rank's number among them.
        max_length: maximum sequence length, one constant for the run, because megatron-core caches RoPE by it.
        boundaries: the layers read the boundaries of sequences.
    """
    index = zigzag_index(micro.cu_seqlens, cp_size, cp_rank)
    scored = micro.mask[index] > 0
    topk_ids = micro.columns.get("topk_ids")
    cu = torch.tensor(micro.cu_seqlens, dtype=torch.int32) if boundaries else None
    stream = PackedStream(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        cu_seqlens_q_padded=cu,
        cu_seqlens_kv_padded=cu,
        max_seqlen_q=max_length,
        max_seqlen_kv=max_length,
        make_plan=partial(plan_attention, micro.cu_seqlens, cp_size, cp_rank),
    )
    return Shard(
        tokens=micro.tokens[index][None],
        positions=micro.positions[index][None],
        rows=scored.nonzero()[:, 0],
        labels=micro.labels[index[scored]],
        index=index[scored],
        stream=stream,
        topk_labels=None if topk_ids is None else topk_ids[index[scored]],
    )

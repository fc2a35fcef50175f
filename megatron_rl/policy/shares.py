"""Shares: rank 0 holds the batch of a step, and a pass sends each data-parallel replica the rows that it computes."""

import heapq
from dataclasses import dataclass

import numpy as np

from megatron_rl.errors import UserError
from megatron_rl.types import Batch


@dataclass(frozen=True)
class Share:
    """The rows of one replica in one pass, and their streams.

    Attributes:
        batch: b rows of the whole batch.
        rows: [b] int64, their numbers in the whole batch, ascending.
        starts: [b] int64, where their tokens begin in the whole batch.
        streams: rows of `batch` in each micro-batch. Every replica has the same number of micro-batches.
        length: tokens of a micro-batch, equal for all replicas.
        align: every trajectory is padded to a multiple of it.
    """

    batch: Batch
    rows: np.ndarray
    starts: np.ndarray
    streams: list[list[int]]
    length: int
    align: int


def make_shares(
    batch: Batch, *, replicas: int, budget: int, align: int, multiple: int, unit: int, split: bool
) -> list[Share]:
    """Divide trajectories into streams of one length, and these over replicas.

    Args:
        batch: the trajectories.
        replicas: number of data-parallel replicas.
        budget: most tokens of a stream.
        align: every trajectory is padded to a multiple of it (2 x cp under context parallelism).
        multiple: each replica's number of micro-batches is a multiple of it.
        unit: the length of the streams is a multiple of it; a divisor of the budget.
        split: make shorter streams, so that all replicas have some. False: as few streams as first-fit decreasing
            needs, and empty ones for the other replicas. Then the streams do not depend on the number of replicas.

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
    count = replicas * multiple
    bins = _bins(padded, budget, count if split else 1)
    bins += [[] for _ in range(-len(bins) % count)]
    length = max((int(padded[rows].sum()) for rows in bins), default=0)
    length = max(1, -(-length // unit)) * unit
    return [_share(batch, bins[replica::replicas], length, align) for replica in range(replicas)]


def _share(batch: Batch, bins: list[list[int]], length: int, align: int) -> Share:
    rows = np.array(sorted(row for rows in bins for row in rows), dtype=np.int64)
    return Share(
        batch=batch if len(rows) == len(batch) else batch.select(rows),
        rows=rows,
        starts=batch.cu_seqlens[rows],
        streams=[np.searchsorted(rows, own).tolist() for own in bins],
        length=length,
        align=align,
    )


def _bins(lengths: np.ndarray, budget: int, multiple: int) -> list[list[int]]:
    """Return rows that share a stream. The number of streams is a multiple of `multiple`.

    It is the smallest that is not less than first-fit decreasing needs. Streams are filled as evenly as possible.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    first_fit = _first_fit(lengths, order, budget)
    first_fit += [[] for _ in range(-len(first_fit) % multiple)]
    fills = [(0, number) for number in range(len(first_fit))]
    even: list[list[int]] = [[] for _ in first_fit]
    for row in order:  # the longest into the emptiest
        fill, number = heapq.heappop(fills)
        even[number].append(row)
        heapq.heappush(fills, (fill + int(lengths[row]), number))
    return first_fit if any(fill > budget for fill, _ in fills) else even


def _first_fit(lengths: np.ndarray, order: list[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for row in order:
        place = next((i for i, free in enumerate(room) if free >= lengths[row]), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(row)
        room[place] -= int(lengths[row])
    return bins

"""Operations within the sequences of packed inputs, without a loop over sequences and without waiting for a device."""

import torch
from torch import Tensor


def dense_ids(ids: Tensor) -> Tensor:
    """Return integer `ids` [T] renumbered from 0 in ascending order of id, [T]."""
    # torch.unique would wait for the device, because its output size depends on the data.
    ascending, order = ids.sort()
    ranks = torch.zeros_like(order)
    ranks[1:] = (ascending[1:] != ascending[:-1]).cumsum(0)
    return torch.zeros_like(order).scatter(0, order, ranks)


def dense_ids_cpu(ids: Tensor) -> Tensor:
    """Return the same as `dense_ids`.

    This is faster where synchronization costs nothing, because only one id of each run of equal ids is sorted.
    """
    runs, run_of_token = torch.unique_consecutive(ids, return_inverse=True)
    dense: Tensor = runs.unique(return_inverse=True)[1]
    return dense.index_select(0, run_of_token)


def packed_running_sum(values: Tensor, rows: Tensor) -> Tensor:
    """Return the sum of `values` [T] up to and including each token of its sequence `rows` [T], summed in float64."""
    order = rows.argsort(stable=True)  # the tokens of a sequence become adjacent and keep their order
    running = values[order].double().cumsum(0)
    first = torch.searchsorted(rows[order], rows[order])  # index at which the token's sequence begins
    before = (running - values[order])[first]
    return torch.zeros_like(values).index_copy(0, order, (running - before).to(values.dtype))


def packed_sort(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return `values` [T] sorted by sequence and then by value, and where each token's sequence begins there, [T]."""
    order = values.argsort()
    order = order[rows[order].argsort(stable=True)]
    return values[order], torch.searchsorted(rows[order], rows)

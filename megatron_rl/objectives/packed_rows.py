"""Operations within the sequences of packed inputs, without a loop over sequences and without waiting for a device."""

import torch
from torch import Tensor, segment_reduce
from torch.nn.functional import pad


class PackedRows:
    """The sequences of packed tokens, numbered from 0 in ascending order of id.

    With `by_runs`, only one id of each run of equal ids is sorted, and sums go over runs. On a CPU, scattered sums take
    four times as long. The number of runs depends on the data, so a GPU would have to be waited for.

    Args:
        ids: integer ids, [T].
        by_runs: see above.
    """

    def __init__(self, ids: Tensor, *, by_runs: bool) -> None:
        self._offsets: Tensor | None = None  # where the runs begin and end, [R + 1]
        self._one_run_each = False
        if by_runs:
            runs, self._run_of_token, lengths = torch.unique_consecutive(ids, return_inverse=True, return_counts=True)
            self._offsets = pad(lengths.cumsum(0), (1, 0))
            distinct, self._rows = runs.unique(return_inverse=True)  # `_rows`: sequence of each run, [R]
            self._one_run_each = len(distinct) == len(runs)
        else:
            self._rows = dense_ids(ids)  # every token is a run of its own

    @property
    def of_token(self) -> Tensor:
        """The sequence of every token, [T]."""
        return self._of_tokens(self._rows)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [T] over each sequence, at its number. There may be zeros beyond the last."""
        if self._offsets is not None:
            values = segment_reduce(values, "sum", offsets=self._offsets)
        return torch.zeros_like(values).index_add(0, self._rows, values)

    def spread(self, by_row: Tensor) -> Tensor:
        """Return for each token the value of its sequence, [T]."""
        return self._of_tokens(by_row.index_select(0, self._rows))

    def running_sums(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [T] up to and including each token of its sequence, [T], summed in float64."""
        if self._offsets is not None and self._one_run_each:
            running = values.double().cumsum(0)
            before = (running - values).index_select(0, self._offsets[:-1])
            return (running - self._of_tokens(before)).to(values.dtype)
        rows = self.of_token
        order = rows.argsort(stable=True)  # the tokens of a sequence become adjacent and keep their order
        running = values[order].double().cumsum(0)
        first = torch.searchsorted(rows[order], rows[order])  # index at which the token's sequence begins
        before = (running - values[order])[first]
        return torch.zeros_like(values).index_copy(0, order, (running - before).to(values.dtype))

    def _of_tokens(self, by_run: Tensor) -> Tensor:
        return by_run if self._offsets is None else by_run.index_select(0, self._run_of_token)


def dense_ids(ids: Tensor) -> Tensor:
    """Return integer `ids` [T] renumbered from 0 in ascending order of id, [T], without waiting for the device."""
    # torch.unique would wait, because its output size depends on the data.
    ascending, order = ids.sort()
    ranks = torch.zeros_like(order)
    ranks[1:] = (ascending[1:] != ascending[:-1]).cumsum(0)
    return torch.zeros_like(order).scatter(0, order, ranks)


def packed_sort(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return `values` [T] sorted by sequence and then by value, and where each token's sequence begins there, [T]."""
    order = values.argsort()
    order = order[rows[order].argsort(stable=True)]
    return values[order], torch.searchsorted(rows[order], rows)

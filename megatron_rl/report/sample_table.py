"""The responses that a report shows: the best, the worst and the most mismatched ones of one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.diagnostics.samples import ShownSample, read_shown_samples

_SHOWN = 3


@dataclass(frozen=True)
class SampleList:
    """A few responses under a title."""

    title: str
    rows: Sequence[ShownSample]


def sample_lists(run_folder: Path) -> tuple[int, list[SampleList]]:
    """Return the last step that has samples, and its lists. (0, []) if the run wrote none."""
    rows = read_shown_samples(run_folder)
    if not rows:
        return 0, []
    step = rows[-1].step
    rows = [row for row in rows if row.step == step]
    best = sorted(rows, key=lambda row: -row.reward)
    lists = [SampleList("Best", best[:_SHOWN]), SampleList("Worst", best[: -_SHOWN - 1 : -1])]
    known = [(row.k3, row) for row in rows if row.k3 is not None]
    if known:
        mismatched = [row for _, row in sorted(known, key=lambda pair: -pair[0])]
        lists.append(SampleList("Most mismatched", mismatched[:_SHOWN]))
    return step, lists

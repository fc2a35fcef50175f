"""What one ERPD round writes into the run log."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.algorithms.erpd.statistics import explained_variance, kl_to_old, shift_table
from megatron_rl.diagnostics.mismatch import ratio_record
from megatron_rl.objectives import Objective
from megatron_rl.trainer.metrics import Stopwatch, batch_record, mean_update
from megatron_rl.types import Batch

Updates = Sequence[dict[str, float]]


@dataclass(frozen=True)
class RoundRecords:
    """One round: its batch, its student's updates, the record of kind "erpd" without its step, and `mu_record`'s ratios."""

    batch: Batch
    student: list[dict[str, float]]
    objective: Objective
    round: dict[str, Any]
    ratios: dict[str, float]

    def records(self, step: int, version: int, watch: Stopwatch, sampled: dict[str, float]) -> list[dict[str, Any]]:
        """The round's record, and the step's, whose loss and gradient are the student's."""
        means = mean_update(self.student)
        step_record = batch_record(step, version, [self.batch], watch, sampled) | means | self.objective.summary(means)
        return [{"kind": "erpd", "step": step, **self.round}, step_record | self.ratios]


def round_record(
    *,
    teacher: Updates,
    student: Updates,
    logold: np.ndarray,
    loge: np.ndarray,
    logp: np.ndarray,
    rewards: np.ndarray,
    trained: np.ndarray,
    outcome: bool,
) -> dict[str, Any]:
    """teacher, student: the updates of the two stages. logold, loge, logp [N]: pi_old, teacher, student on the batch.

    rewards [N]: of each token's trajectory. outcome: the teacher's probabilities are meant to be the rewards.
    Lists are per update or, under `erpd/shift/`, per bin; the outermost bin is open.
    """
    table = shift_table(loge, logold, logp, trained)
    record: dict[str, Any] = {
        "erpd/teacher/updates": len(teacher),
        "erpd/student/updates": len(student),
        "erpd/teacher/kl": kl_to_old(loge, logold, trained),
        "erpd/student/kl": kl_to_old(logp, logold, trained),
        "erpd/student/clipped": float(np.mean([_clipped(update) for update in student])),
        "erpd/shift/edges": table.edges[:-1].tolist(),
        "erpd/shift/count": table.count.tolist(),
        "erpd/shift/mean": table.mean.tolist(),
        "erpd/shift/median": table.median.tolist(),
    }
    for name, updates in (("teacher", teacher), ("student", student)):
        for key in sorted(set().union(*updates) - {"tokens", "lr"}):
            record[f"erpd/{name}/{key}"] = [update.get(key) for update in updates]
    if outcome:
        record["erpd/teacher/explained_variance"] = explained_variance(loge, rewards, trained)
    return record


def mu_record(batch: Batch, logold: np.ndarray, logp: np.ndarray) -> dict[str, float]:
    """Statistics against the engine's policy mu, empty when the batch carries no logmu.

    `mismatch/...` is pi_old, the weights that sampled; `kl/...`, `ratio/...` and `dp/...` are the student after the round.
    logold, logp [N]: of pi_old and of the student.
    """
    if batch.logmu is None:
        return {}
    trained = batch.mask > 0
    logmu = batch.logmu[trained]
    mismatch = {f"mismatch/{name}": value for name, value in ratio_record(logold[trained], logmu).items()}
    return ratio_record(logp[trained], logmu) | mismatch


def _clipped(update: dict[str, float]) -> float:
    return sum(value for name, value in update.items() if name.startswith("clip/"))

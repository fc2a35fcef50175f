"""The records that one ERPD round writes into the run log."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.algorithms.erpd.statistics import explained_variance, kl_to_old, shift_table
from megatron_rl.diagnostics.mismatch import ratio_record
from megatron_rl.objectives import Objective
from megatron_rl.trainer.metrics import Stopwatch, batch_record, mean_update, trajectory_k3
from megatron_rl.types import Batch

Updates = Sequence[dict[str, float]]


@dataclass(frozen=True)
class RoundRecords:
    """The results of one round.

    Attributes:
        batch: the round's batch.
        logold: [N], log-probabilities of the batch under pi_old, which sampled it.
        student: the student's updates.
        objective: the student's objective.
        round: the record of kind "erpd", without its step.
        ratios: the ratios of `mu_record`.
    """

    batch: Batch
    logold: np.ndarray
    student: list[dict[str, float]]
    objective: Objective
    round: dict[str, Any]
    ratios: dict[str, float]

    def records(self, step: int, version: int, watch: Stopwatch, sampled: dict[str, float]) -> list[dict[str, Any]]:
        """Return the round's record and the step's. Loss and gradient of the step are the student's.

        Args:
            step: number of the step, from 0.
            version: version of the weights that the step started from.
            watch: seconds of each phase of the step so far.
            sampled: `Rollouts.sampled`, the metrics of sampling.
        """
        means = mean_update(self.student)
        step_record = batch_record(step, version, [self.batch], watch, sampled) | means | self.objective.summary(means)
        return [{"kind": "erpd", "step": step, **self.round}, step_record | self.ratios]

    def k3(self) -> dict[int, float]:
        """Return k3 by trajectory id, of pi_old: trainer and engine at equal weights; see `Learned`."""
        return trajectory_k3(self.batch, self.logold)


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
    """Return the record of a round.

    Lists have one entry per update or, under `erpd/shift/`, one per bin. The outermost bin is open.

    Args:
        teacher: the updates of stage 1.
        student: the updates of stage 2.
        logold: [N], log-probabilities of the batch under pi_old.
        loge: [N], under the teacher.
        logp: [N], under the student.
        rewards: [N], reward of each token's trajectory.
        trained: [N] bool, tokens that are trained on.
        outcome: True if the teacher's probabilities predict the rewards.
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
    """Return statistics against the engine's policy mu; empty if the batch has no logmu.

    `mismatch/...` compares pi_old, the weights that sampled. `kl/...`, `ratio/...` and `dp/...` compare the student
    after the round.

    Args:
        batch: the round's batch.
        logold: [N], log-probabilities under pi_old.
        logp: [N], log-probabilities under the student.
    """
    if batch.logmu is None:
        return {}
    trained = batch.mask > 0
    logmu = batch.logmu[trained]
    mismatch = {f"mismatch/{name}": value for name, value in ratio_record(logold[trained], logmu).items()}
    return ratio_record(logp[trained], logmu) | mismatch


def _clipped(update: dict[str, float]) -> float:
    return sum(value for name, value in update.items() if name.startswith("clip/"))

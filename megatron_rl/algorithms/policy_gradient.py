"""Policy gradient: one pass over the step's batch, cut into the step's optimizer updates."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_rl.algorithms.alp_probe import score_clean
from megatron_rl.diagnostics.alp_effect import rounding_warning
from megatron_rl.objectives import Objective
from megatron_rl.policy.actor import Policy, UpdateStats
from megatron_rl.trainer.metrics import Stopwatch, step_record, trajectory_k3
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.types import Batch


@dataclass(frozen=True)
class Updates:
    """The updates of a step in order, with the statistics of each.

    Attributes:
        parts: the batch of each update.
        stats: the outcome of each update.
        objective: makes the metrics that are ratios of others.
        alp: the effect of ALP's noise on some tokens of the first update; empty without ALP.
    """

    parts: list[Batch]
    stats: list[UpdateStats]
    objective: Objective
    alp: dict[str, float] = field(default_factory=dict)

    def records(self, step: int, version: int, watch: Stopwatch, sampled: dict[str, float]) -> list[dict[str, Any]]:
        """Return the one record of the step; see `trainer.learned.Learned`."""
        record = step_record(step, version, self.parts, self.stats, watch, sampled)
        metrics = {name: value for name, value in record.items() if isinstance(value, float)}
        return [record | self.objective.summary(metrics) | self.alp]

    def k3(self) -> dict[int, float]:
        """Return k3 by trajectory id, from the weights before the trajectory's update; see `Learned`."""
        found: dict[int, float] = {}
        for part, one in zip(self.parts, self.stats, strict=True):
            assert one.logp is not None  # rank 0 has it
            found |= trajectory_k3(part, one.logp)
        return found


class PolicyGradient:
    """The algorithm of every objective that uses each batch once."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def collect(self, trainer: Trainer, watch: Stopwatch) -> Batch:
        """Return a batch sampled from the weights that the engines serve, or from recent ones. Collective."""
        return trainer.collect(watch)

    def learn(self, trainer: Trainer, batch: Batch, watch: Stopwatch) -> Updates:
        """Make the step's optimizer updates. Collective."""
        policy, objective, alp = trainer.policy, self.objective, trainer.config.alp.enabled
        with watch("update"):
            if "staleness" in objective.needs:
                batch = with_staleness(batch, trainer.state.version)
            # Without noise, the forward pass of the first update computes `logold` of its own part.
            own = "logold" in objective.needs and batch.logold is None and not alp
            parts = scored_parts(policy, batch, objective.needs, trainer.config.optimizer.updates_per_step, own)
            clean = score_clean(policy, parts[0]) if alp else None
            norm = trainer.plan.algorithm.norm
            stats = [policy.update(parts[0], objective, norm, own_logold=own)]
            stats += [policy.update(part, objective, norm) for part in parts[1:]]
        if clean is None or trainer.lead is None:
            return Updates(parts, stats, objective)
        record = clean.record(stats[0])
        trainer.lead.warn_once(rounding_warning(record) if record else None)
        return Updates(parts, stats, objective, record)


def scored_parts(policy: Policy, batch: Batch, needs: frozenset[str], updates: int, own_logold: bool) -> list[Batch]:
    """Return the batches of a step's updates, with the log-probabilities of the trainer that `needs` names. Collective.

    Args:
        policy: the trainer's policy.
        batch: the step's batch.
        needs: `Objective.needs`.
        updates: number of updates.
        own_logold: the first update computes its `logold` itself: that part has none.
    """
    if not own_logold:
        return split_updates(with_columns(policy, batch, needs), updates)
    batch = with_columns(policy, batch, needs - {"logold"})
    first, *later = split_updates(batch, updates)
    if not later:
        return [first]
    rest = batch.select(np.flatnonzero(~np.isin(batch.groups, first.groups)))
    return [first, *split_updates(with_columns(policy, rest, needs), updates - 1)]


def with_columns(policy: Policy, batch: Batch, needs: frozenset[str]) -> Batch:
    """Return the batch with the log-probabilities of the trainer that `needs` names. Collective.

    Args:
        policy: the trainer's policy.
        batch: the batch; columns that it has are kept.
        needs: `Objective.needs`.
    """
    if "logold" in needs and batch.logold is None:
        batch = batch.with_columns(logold=policy.logprobs(batch))
    if "logref" in needs and batch.logref is None:
        batch = batch.with_columns(logref=policy.reference_logprobs(batch))
    return batch


def with_staleness(batch: Batch, version: int) -> Batch:
    """Return the batch with the age of every token, in versions before `version`.

    The step trains from `version`.
    """
    assert batch.versions is not None  # engines always report them
    return batch.with_columns(staleness=np.where(batch.mask > 0, version - batch.versions, 0).astype(np.float32))


def split_updates(batch: Batch, updates: int) -> list[Batch]:
    """Cut a step's batch into `updates` parts of whole groups."""
    parts = np.array_split(np.unique(batch.groups), updates)
    return [batch.select(np.flatnonzero(np.isin(batch.groups, part))) for part in parts]

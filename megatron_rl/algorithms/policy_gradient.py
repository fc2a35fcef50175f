"""An ordinary step's learning: one pass over the batch, cut into the step's optimizer updates."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from megatron_rl.algorithms.alp_probe import probe
from megatron_rl.diagnostics.alp_effect import swallowed
from megatron_rl.objectives import Objective
from megatron_rl.policy.actor import Policy, UpdateStats
from megatron_rl.sampling.batch import split_updates
from megatron_rl.trainer.bringup import Run
from megatron_rl.trainer.metrics import Stopwatch, step_record
from megatron_rl.types import Batch


class Learned(Protocol):
    """What a step has learned, as the loop needs it."""

    def records(self, step: int, version: int, watch: Stopwatch, sampled: dict[str, float]) -> list[dict[str, Any]]:
        """For the run log, on rank 0. version: the weights the step started from. sampled: `Rollouts.sampled`."""
        ...


@dataclass(frozen=True)
class Updates:
    """The updates of a step in order, and what each did. probe: what a perturbation did to some tokens of the first."""

    parts: list[Batch]
    stats: list[UpdateStats]
    objective: Objective
    probe: dict[str, float] = field(default_factory=dict)

    def records(self, step: int, version: int, watch: Stopwatch, sampled: dict[str, float]) -> list[dict[str, Any]]:
        record = step_record(step, version, self.parts, self.stats, watch, sampled)
        metrics = {name: value for name, value in record.items() if isinstance(value, float)}
        return [record | self.objective.summary(metrics) | self.probe]


def collect(run: Run, watch: Stopwatch) -> Batch:
    """The batch of the next step, sampled from the weights the engines serve, or not much older ones. Collective."""
    return run.mesh.on_lead(lambda: run.collect(run.state.step, watch))


def learn(run: Run, batch: Batch, watch: Stopwatch) -> Updates:
    """Make the step's updates. Collective."""
    with watch("update"):
        batch = with_columns(run.policy, batch, run.objective.needs)
        if "staleness" in run.objective.needs:
            batch = with_staleness(batch, run.state.version)
        parts = split_updates(batch, run.config.optimizer.updates_per_step)
        clean = probe(run.policy, parts[0]) if run.config.alp.enabled else None
        stats = [run.policy.update(part, run.objective, run.norm) for part in parts]
    if clean is None or run.mesh.rank != 0:
        return Updates(parts, stats, run.objective)
    record = clean.record(stats[0])
    run.warn_once(swallowed(record) if record else None)
    return Updates(parts, stats, run.objective, record)


def with_columns(policy: Policy, batch: Batch, needs: frozenset[str]) -> Batch:
    """The batch with the log-probabilities that the trainer itself computes, where they are needed. Collective."""
    if "logold" in needs and batch.logold is None:
        batch = replace(batch, logold=policy.logprobs(batch))
    if "logref" in needs and batch.logref is None:
        batch = replace(batch, logref=policy.reference_logprobs(batch))
    return batch


def with_staleness(batch: Batch, version: int) -> Batch:
    """The batch with the age of every token; version: of the weights the step trains from."""
    assert batch.versions is not None  # engines tell them, always
    return replace(batch, staleness=np.where(batch.mask > 0, version - batch.versions, 0).astype(np.float32))


def epoch_part(batch: Batch, parts: int, update: int, seed: tuple[int, ...]) -> Batch:
    """The part of update number `update` (from 0) of a stage that goes through the batch again and again.

    Each epoch cuts it into `parts` parts of whole groups, in an order that follows from (seed, epoch) alone.
    """
    epoch, at = divmod(update, parts)
    order = np.random.default_rng((*seed, epoch)).permutation(np.unique(batch.groups))
    chosen = np.array_split(order, parts)[at]
    return batch.select(np.flatnonzero(np.isin(batch.groups, chosen)))

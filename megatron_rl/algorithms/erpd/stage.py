"""One stage of a round: optimizer updates on one batch in several epochs. It can be resumed after any update."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megatron_rl.algorithms.erpd.round_folder import STAGES, RoundFolder
from megatron_rl.objectives import Objective
from megatron_rl.policy.actor import UpdateStats
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.trainer.metrics import update_record
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.types import Batch


@dataclass(frozen=True)
class Stage:
    """One stage of a round.

    Attributes:
        name: one of STAGES.
        updates: number of optimizer updates.
        lr: learning rate.
        objective: objective of the stage.
        batch: returns the whole batch for update number i (from 0).
        checkpoints: checkpoints of the stage.
        save_every: updates between checkpoints; the last update also makes one.
        restart: restores the policy that the stage starts from.
        kept: further updates after which a checkpoint is made.
    """

    name: str
    updates: int
    lr: float
    objective: Objective
    batch: Callable[[int], Batch]
    checkpoints: Checkpoints
    save_every: int
    restart: Callable[[], None]
    kept: tuple[int, ...] = ()


def run_stage(trainer: Trainer, folder: RoundFolder, stage: Stage) -> None:
    """Run a stage to its last update, from its newest checkpoint, or from its start with a fresh optimizer. Collective.

    Args:
        trainer: the trainer of the run.
        folder: the folder of the round.
        stage: the stage.

    Raises:
        KeyboardInterrupt: a stop was requested. A checkpoint is saved before.
    """
    done = _enter(trainer, folder, stage)
    seed = (trainer.config.run.seed % 2**32, trainer.state.step, STAGES.index(stage.name))
    norm = stage.objective.norm
    assert norm is not None  # every objective sets it in its constructor
    while done < stage.updates:
        if trainer.interrupted():
            _save(trainer, stage, done, wait=True)
            raise KeyboardInterrupt
        part = epoch_part(stage.batch(done), trainer.config.optimizer.updates_per_step, done, seed)
        stats = trainer.policy.update(part, stage.objective, norm)
        done += 1
        stage.checkpoints.finish(wait=False)
        trainer.mesh.on_lead(partial(_log_update, folder, stage, part, stats))
        if done in stage.kept or done == stage.updates or done % stage.save_every == 0:
            _save(trainer, stage, done, wait=done == stage.updates)
            trainer.print_line(
                f"step {trainer.state.step}: {stage.name} {done}/{stage.updates} | loss {stats.loss:.4g}"
            )


def _log_update(folder: RoundFolder, stage: Stage, part: Batch, stats: UpdateStats) -> None:
    record = update_record(part, stats)
    folder.add_update(stage.name, record | stage.objective.summary(record))


def _enter(trainer: Trainer, folder: RoundFolder, stage: Stage) -> int:
    """Restore the newest checkpoint, or restart the stage. Return the number of updates done."""
    state = stage.checkpoints.load_newest()
    if state is None:
        stage.restart()
        trainer.policy.optimizer.restart()
    trainer.policy.optimizer.base_lr = stage.lr
    done = 0 if state is None else state.stage_updates
    trainer.mesh.on_lead(lambda: folder.updates(stage.name, done))
    return done


def _save(trainer: Trainer, stage: Stage, done: int, *, wait: bool) -> None:
    updates = trainer.policy.optimizer.updates
    stage.checkpoints.save(replace(trainer.state, updates=updates, stage=stage.name, stage_updates=done), wait=wait)


def epoch_part(batch: Batch, parts: int, update: int, seed: tuple[int, ...]) -> Batch:
    """Return the part of the batch that an update of a stage trains on; a stage goes through the batch in epochs.

    Args:
        batch: the whole batch.
        parts: number of parts of whole groups that an epoch is cut into.
        update: number of the update in the stage, from 0.
        seed: with the epoch, decides the order of the groups.
    """
    epoch, at = divmod(update, parts)
    order = np.random.default_rng((*seed, epoch)).permutation(np.unique(batch.groups))
    chosen = np.array_split(order, parts)[at]
    return batch.select(np.flatnonzero(np.isin(batch.groups, chosen)))

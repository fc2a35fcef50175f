"""One stage of a round: optimizer updates that go through one batch again and again, resumable at any of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from megatron_rl.algorithms.erpd.round_folder import STAGES, RoundFolder
from megatron_rl.algorithms.policy_gradient import epoch_part
from megatron_rl.objectives import Objective
from megatron_rl.policy.actor import UpdateStats
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.trainer.bringup import Run
from megatron_rl.trainer.metrics import update_record
from megatron_rl.types import Batch


@dataclass(frozen=True)
class Stage:
    """name: of STAGES. batch: the whole batch as update number i (from 0) sees it. kept: updates after which a checkpoint
    is made besides every `save_every` and the last. restart: bring the policy to where the stage starts."""

    name: str
    updates: int
    lr: float
    objective: Objective
    batch: Callable[[int], Batch]
    checkpoints: Checkpoints
    save_every: int
    restart: Callable[[], None]
    kept: tuple[int, ...] = ()


def run_stage(run: Run, folder: RoundFolder, stage: Stage) -> None:
    """From its newest checkpoint, or from its start with a fresh optimizer, to its last update. Collective.

    Raises KeyboardInterrupt, with a checkpoint made, when a stop was asked for.
    """
    done = _enter(run, folder, stage)
    seed = (run.config.run.seed % 2**32, run.state.step, STAGES.index(stage.name))
    norm = stage.objective.norm
    assert norm is not None  # filled in by the objective itself
    while done < stage.updates:
        if run.mesh.any(run.interrupted):
            _save(run, stage, done, wait=True)
            raise KeyboardInterrupt
        part = epoch_part(stage.batch(done), run.config.optimizer.updates_per_step, done, seed)
        stats = run.policy.update(part, stage.objective, norm)
        done += 1
        stage.checkpoints.finish(wait=False)
        run.mesh.on_lead(partial(_log_update, folder, stage, part, stats))
        if done in stage.kept or done == stage.updates or done % stage.save_every == 0:
            _save(run, stage, done, wait=done == stage.updates)
            run.say(f"step {run.state.step}: {stage.name} {done}/{stage.updates} | loss {stats.loss:.4g}")


def _log_update(folder: RoundFolder, stage: Stage, part: Batch, stats: UpdateStats) -> None:
    record = update_record(part, stats)
    folder.add_update(stage.name, record | stage.objective.summary(record))


def _enter(run: Run, folder: RoundFolder, stage: Stage) -> int:
    """Updates done so far."""
    state = stage.checkpoints.load_newest()
    if state is None:
        stage.restart()
        run.policy.optimizer.restart()
    run.policy.optimizer.base_lr = stage.lr
    done = 0 if state is None else state.stage_updates
    run.mesh.on_lead(lambda: folder.updates(stage.name, done))
    return done


def _save(run: Run, stage: Stage, done: int, *, wait: bool) -> None:
    updates = run.policy.optimizer.updates
    stage.checkpoints.save(replace(run.state, updates=updates, stage=stage.name, stage_updates=done), wait=wait)

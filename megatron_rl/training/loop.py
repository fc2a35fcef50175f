"""The loop: one way round, once per step, on every rank alike."""

from dataclasses import replace
from functools import partial

from megatron_rl.training.batches import split_updates
from megatron_rl.training.records import Stopwatch, step_record
from megatron_rl.training.run import Run


def train(run: Run) -> None:
    """Train until `run.steps` steps are done, from wherever `run` stands.

    Raises KeyboardInterrupt on every rank when the user asked to stop; `run.state` is then the last whole step.
    """
    config, policy, objective = run.config, run.policy, run.objective
    run.publish(run.state.version)
    if run.state.step == 0:
        run.evaluate()
    while run.state.step < config.run.steps:
        step, version, watch = run.state.step, run.state.version, Stopwatch()
        batch = run.mesh.on_lead(partial(run.collect, step, watch))
        with watch("update"):
            if "logold" in objective.needs:
                batch = replace(batch, logold=policy.logprobs(batch))
            parts = split_updates(batch, config.optimizer.updates_per_step)
            stats = [policy.update(part, objective, run.norm) for part in parts]
        with watch("sync"):
            run.publish(version + 1)
        run.advance(step + 1, version + 1)
        if run.mesh.rank == 0:
            run.record(step_record(step, version, parts, stats, watch, run.rollouts.truncated))
        last = run.state.step == config.run.steps
        if last or (config.eval.every and run.state.step % config.eval.every == 0):
            run.evaluate()
        if last or (config.run.save_every and run.state.step % config.run.save_every == 0):
            run.save(wait=last)
    run.export()

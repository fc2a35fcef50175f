"""The loop: one way round, once per step, on every rank alike."""

from megatron_rl.algorithms import policy_gradient as update
from megatron_rl.algorithms.erpd import round as erpd
from megatron_rl.algorithms.policy_gradient import Learned
from megatron_rl.trainer.attribution import attribute_step, weights_if_due
from megatron_rl.trainer.bringup import Run
from megatron_rl.trainer.metrics import Stopwatch


def train(run: Run) -> None:
    """Train until `run.steps` steps are done, from wherever `run` stands.

    Raises KeyboardInterrupt on every rank when the user asked to stop; `run.state` is then the last whole step.
    """
    config = run.config
    run.publish(run.state.version)
    if run.state.step == 0:
        run.evaluate()
    while run.state.step < config.run.steps:
        step, version, watch = run.state.step, run.state.version, Stopwatch()
        sampled = weights_if_due(run)
        learned: Learned
        if run.plan is None:
            learned = update.learn(run, update.collect(run, watch), watch)
        else:
            learned = erpd.learn(run, run.plan, erpd.collect(run, watch), watch)
        attributed = None
        if sampled is not None:
            with watch("attribution"):
                attributed = attribute_step(run, sampled)
        with watch("sync"):
            run.settle()
            run.publish(run.state.version + 1)
        run.advance(step + 1, run.state.version + 1)
        if run.mesh.rank == 0:
            for record in learned.records(step, version, watch, run.rollouts.sampled):
                run.record(record)
            if attributed is not None:
                run.record(attributed.record(run.state.step, sampled_by=step))
        if run.due(run.state.step, config.eval.every):
            run.evaluate()
        if run.due(run.state.step, config.run.save_every):
            run.save(wait=run.state.step == config.run.steps)
    run.export()

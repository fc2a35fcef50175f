"""The training loop: the same sequence of calls in every step, on every rank."""

from collections.abc import Sequence
from typing import Any, Protocol

from megatron_rl.trainer.algorithm import Algorithm
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.trainer import Trainer


class StepHook(Protocol):
    """Extra work inside a step. Both calls are collective."""

    def before_step(self, trainer: Trainer) -> None:
        """Run before the step's batch is collected, when engines and policy hold the same weights."""
        ...

    def before_publish(self, trainer: Trainer, watch: Stopwatch) -> list[dict[str, Any]]:
        """Run after the step's updates, while engines still hold the old weights. Return log records."""
        ...


def train(trainer: Trainer, algorithm: Algorithm, hooks: Sequence[StepHook] = ()) -> None:
    """Train until `run.steps` steps are done, starting from `trainer.state`.

    Args:
        trainer: the trainer of the run.
        algorithm: the training method.
        hooks: extra work inside every step.

    Raises:
        KeyboardInterrupt: on every rank, if a stop was requested; `trainer.state` is then the last whole step.
    """
    config = trainer.config
    trainer.turn_to_engines()
    trainer.publish(trainer.state.version)
    if trainer.state.step == 0:
        trainer.evaluate()
    while trainer.state.step < config.run.steps:
        trainer.stop_if_due()
        step, version, watch = trainer.state.step, trainer.state.version, Stopwatch()
        for hook in hooks:
            hook.before_step(trainer)
        batch = algorithm.collect(trainer, watch)
        trainer.turn_to_trainer(watch)
        learned = algorithm.learn(trainer, batch, watch)
        extra = [record for hook in hooks for record in hook.before_publish(trainer, watch)]
        with watch("sync"):
            trainer.settle()
            trainer.turn_to_engines()
            trainer.publish(trainer.state.version + 1)
        trainer.advance(step + 1, trainer.state.version + 1)
        trainer.record_step(learned, step, version, watch, extra)
        if trainer.due(trainer.state.step, config.eval.every):
            trainer.evaluate()
        if trainer.due(trainer.state.step, config.run.save_every):
            trainer.save(wait=trainer.state.step == config.run.steps)
    trainer.export()

"""Interface of a training method: how a step collects its batch, and how it updates the policy."""

from typing import Protocol

from megatron_rl.trainer.learned import Learned
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.types import Batch


class Algorithm(Protocol):
    """A training method. Both calls are collective: every rank makes them in the same order."""

    def collect(self, trainer: Trainer, watch: Stopwatch) -> Batch:
        """Return the batch of the next step on rank 0; on other ranks, its columns without rows."""
        ...

    def learn(self, trainer: Trainer, batch: Batch, watch: Stopwatch) -> Learned:
        """Update the policy with the batch.

        Args:
            trainer: the trainer of the run.
            batch: the result of `collect`.
            watch: measures the phases of the step.

        Raises:
            KeyboardInterrupt: on every rank, if a stop was requested.
        """
        ...

"""Interface of the result of a step: what the run log and the samples need of it."""

from typing import Any, Protocol

from megatron_rl.trainer.metrics import Stopwatch


class Learned(Protocol):
    """The result of a step's updates, as the run log needs it."""

    def records(self, step: int, version: int, watch: Stopwatch, sampled: dict[str, float]) -> list[dict[str, Any]]:
        """Return the step's log records. For rank 0.

        Args:
            step: number of the step, from 0.
            version: version of the weights that the step started from.
            watch: seconds of each phase of the step so far.
            sampled: `Rollouts.sampled`, the metrics of sampling.
        """
        ...

    def k3(self) -> dict[int, float]:
        """Return `trajectory_k3` of the step's batch by trajectory id; empty if logmu is unknown. For rank 0."""
        ...

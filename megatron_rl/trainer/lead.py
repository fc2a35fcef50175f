"""Rank 0's side of a run: sampling, engines, run log and live line. No other rank has one."""

from dataclasses import dataclass, field
from typing import Any

from megatron_rl.diagnostics.evaluations import Evaluation, EvaluationLog
from megatron_rl.diagnostics.runlog import RunLog
from megatron_rl.diagnostics.samples import SampleLog
from megatron_rl.engines.offload import OffloadedEngines
from megatron_rl.engines.pool import EnginePool
from megatron_rl.sampling.rollouts import Rollouts
from megatron_rl.trainer.learned import Learned
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.progress import ProgressLine
from megatron_rl.trainer.stops import Stops


@dataclass
class Lead:
    """What rank 0 owns in addition to the policy.

    Attributes:
        rollouts: draws prompts and returns the verified batch of a step.
        offloaded: the engines whose memory is released.
        log: the run log.
        samples: the file of samples.
        evaluations: the file of evaluations.
        progress: the live line.
        stops: requests to stop.
        interrupted: whether a stop at the next safe point was requested.
    """

    rollouts: Rollouts
    offloaded: OffloadedEngines
    log: RunLog
    samples: SampleLog
    evaluations: EvaluationLog
    progress: ProgressLine
    stops: Stops
    interrupted: bool = False
    _warned: bool = field(default=False, init=False)

    @property
    def pool(self) -> EnginePool:
        """The pool of engines that generate."""
        return self.rollouts.pool

    def record(self, record: dict[str, Any]) -> None:
        """Append a record to the run log; a step's record also moves the live line."""
        self.log.append(record)
        if record["kind"] == "step":
            self.progress.step(record)

    def record_step(
        self, learned: Learned, step: int, version: int, watch: Stopwatch, extra: list[dict[str, Any]]
    ) -> None:
        """Write the records and the samples of a step that is over; see `Trainer.record_step`."""
        for record in learned.records(step, version, watch, self.rollouts.sampled) + extra:
            self.record(record)
        self.samples.append(self.rollouts.samples(step, learned.k3()))

    def record_evaluation(self, evaluation: Evaluation, version: int) -> dict[str, float]:
        """Write an evaluation of the weights of a version, and return its pass rates."""
        self.evaluations.append(evaluation)
        rates = evaluation.rates
        self.record({"kind": "eval", "step": evaluation.step, "version": version, **rates})
        return rates

    def warn_once(self, text: str | None) -> None:
        """Print a warning unless one was printed before. Do nothing for None."""
        if text is not None and not self._warned:
            self._warned = True
            self.progress.note(f"warning: {text}")

    def offload_engines(self) -> None:
        """Release the memory of every engine until `reload_engines` and the next weight update."""
        self.offloaded.release(self.pool)

    def reload_engines(self) -> None:
        """Make offloaded engines allocate their memory again. They generate after the next weight update."""
        self.offloaded.resume(self.pool)

    def stop_soon(self, *_: object) -> None:
        """Signal handler: stop at the next safe point, and cancel generation that is running."""
        self.interrupted = True
        self.pool.interrupt()

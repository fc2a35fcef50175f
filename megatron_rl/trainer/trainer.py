"""The trainer: state and steps of one run, on every rank."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from megatron_rl.config import Config
from megatron_rl.errors import EngineError, UserError
from megatron_rl.plan import RunPlan
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.policy.parallel import Mesh
from megatron_rl.policy.trainer_memory import TrainerMemory
from megatron_rl.trainer.lead import Lead
from megatron_rl.trainer.learned import Learned
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.turns import Turns
from megatron_rl.types import Batch
from megatron_rl.weight_sync.publish import publish_weights
from megatron_rl.weight_sync.sync import WeightSync

T = TypeVar("T")


@dataclass
class Trainer:
    """What the loop and the algorithms work with. Every method is collective unless it says otherwise.

    Attributes:
        config: the resolved configuration.
        plan: the resolved plan of the run.
        mesh: the position of this rank in the parallel layout.
        policy: the trained model.
        checkpoints: the run's checkpoints, by step.
        sync: sends weights to the engines.
        lead: rank 0's side of the run; None on the other ranks.
        state: state after the last whole step.
        holds_step_weights: the policy holds the weights of `state.step`, not those of a stage inside the next step.
        turns: turns of trainer and engines on the same GPUs; None without `rollout.colocate`.
    """

    config: Config
    plan: RunPlan
    mesh: Mesh
    policy: Policy
    checkpoints: Checkpoints
    sync: WeightSync
    lead: Lead | None = field(repr=False)
    state: TrainState
    holds_step_weights: bool = True
    turns: Turns | None = field(init=False, default=None, repr=False)
    _save_due: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.config.rollout.colocate:
            memory = TrainerMemory(self.policy.chunks, self.policy.optimizer.core)
            self.turns = Turns(self.mesh, memory, self.on_lead)

    def on_lead(self, work: Callable[[Lead], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank. An error is raised on every rank."""

        return self.mesh.on_lead(partial(self._with_lead, work))

    def _with_lead(self, work: Callable[[Lead], T]) -> T:
        assert self.lead is not None  # the mesh calls this on rank 0 only
        return work(self.lead)

    def stop_if_due(self) -> None:
        """Raise KeyboardInterrupt on every rank if the run must stop before its next step."""

        def check(lead: Lead) -> None:
            if lead.stops.due_before_step() or lead.interrupted:
                raise KeyboardInterrupt

        self.on_lead(check)

    def turn_to_engines(self) -> None:
        """Give GPUs that are shared to the engines, before they get weights and generate."""
        if self.turns is not None:
            self.turns.to_engines()

    def turn_to_trainer(self, watch: Stopwatch) -> None:
        """Give GPUs that are shared to the trainer, before it learns. Make the checkpoint that waited for this."""
        if self.turns is None:
            return
        with watch("turn"):
            self.turns.to_trainer()
        if self._save_due:
            self.save(wait=False)

    def collect(self, watch: Stopwatch) -> Batch:
        """Return the batch of the next step on rank 0; on other ranks, its columns without rows.

        Raises KeyboardInterrupt when a stop was requested.
        """

        def collect(lead: Lead) -> Batch:
            if lead.interrupted:
                raise KeyboardInterrupt
            return lead.rollouts.collect(self.state.step, self.state.version, watch)

        return self._sampled(collect, Batch.without_rows)

    def _sampled(self, sample: Callable[[Lead], T], elsewhere: Callable[[T], T]) -> T:
        """Run `sample` on rank 0. If data or reward fail there, keep the steps that were done, then raise.

        Args:
            sample: its result is returned on rank 0.
            elsewhere: returns the part of the result that the other ranks get.

        Raises:
            KeyboardInterrupt: engines failed after a stop was requested. Its signal may have reached them, too.
        """
        try:
            return self.mesh.keep_on_lead(partial(self._with_lead, sample), elsewhere)
        except EngineError:
            if self.interrupted():
                raise KeyboardInterrupt from None
            raise
        except UserError:
            if self.state.step:
                self.ensure_saved()
            raise

    def publish(self, version: int) -> None:
        """Send the policy's weights to every engine as `version`, and verify them. Raises EngineError if that fails."""
        publish_weights(self.policy, self.sync, self.plan.precision, version)

    def settle(self) -> None:
        """In a deterministic run, wait for every group that the current weights may sample."""
        self.on_lead(lambda lead: lead.rollouts.settle())

    def advance(self, step: int, version: int) -> None:
        """Set `state` to `step` whole steps, and complete a checkpoint whose files are already on disk."""
        self.checkpoints.finish(wait=False)
        below, ahead = self.on_lead(lambda lead: lead.rollouts.drawn)
        updates = self.policy.optimizer.updates
        self.state = replace(self.state, step=step, version=version, updates=updates, drawn=below, drawn_ahead=ahead)
        self.holds_step_weights = True

    def record_step(
        self, learned: Learned, step: int, version: int, watch: Stopwatch, extra: list[dict[str, Any]]
    ) -> None:
        """Write the records and the samples of a step that is over, on rank 0. An error ends every rank.

        Args:
            learned: the result of the step.
            step: number of the step, from 0.
            version: version of the weights that the step started from.
            watch: seconds of each phase of the step.
            extra: records of the hooks.
        """
        self.on_lead(lambda lead: lead.record_step(learned, step, version, watch, extra))

    def evaluate(self) -> None:
        """Log held-out pass rates of the current weights. Do nothing if `eval.prompts` is 0."""
        if self.config.eval.prompts == 0:
            return

        def evaluate(lead: Lead) -> dict[str, float]:
            return lead.record_evaluation(lead.rollouts.evaluate(self.state.step), self.state.version)

        rates = self._sampled(evaluate, lambda found: found)
        text = ", ".join(f"{name.removeprefix('eval/')} {rate:.1%}" for name, rate in rates.items())
        self.print_line(f"held-out pass rate after {self.state.step} steps: {text}")

    def due(self, step: int, every: int) -> bool:
        """Return whether work of every `every` steps (0: only at the end) is due after `step` steps. Not collective."""
        return step == self.config.run.steps or bool(every and step % every == 0)

    def save(self, *, wait: bool) -> None:
        """Save a checkpoint of the last whole step. Do nothing inside a stage: the step's checkpoint exists by then.

        While engines have the GPUs, a checkpoint that nobody waits for is made at the trainer's next turn.
        """
        self._save_due = False
        if self.turns is not None and not self.turns.trainer_is_ready:
            if not wait:
                self._save_due = True
                return
            self.turns.to_trainer()
        if self.holds_step_weights:
            self.checkpoints.save(self.state, wait=wait)

    def ensure_saved(self) -> None:
        """Return once the checkpoint of this step is complete on disk."""
        self.checkpoints.finish(wait=True)
        if not self.checkpoints.has(self.state.step):
            self.save(wait=True)

    def export(self) -> None:
        """Write the policy as a complete Hugging Face folder, `hf/` in the run folder. The run is then done."""
        self.on_lead(lambda lead: lead.stops.control.check_attempt())
        self.policy.save_hf(self.config.run.folder / "hf")
        self.on_lead(lambda lead: lead.stops.control.write_done(self.state.step))

    def stop(self) -> None:
        """Save the last whole step, and record in the control folder that and why the run stopped."""
        self.checkpoints.finish(wait=True)
        if self.checkpoints.saved != self.state.step:
            self.save(wait=True)
        self.on_lead(lambda lead: lead.stops.control.write_stopped(self.state.step, lead.stops.reason))
        self.mesh.barrier()
        if self.lead is not None:
            print(f"stopped after {self.state.step} steps; go on with --resume", file=sys.stderr, flush=True)

    def interrupted(self) -> bool:
        """Return whether a stop was requested, on every rank."""
        return self.mesh.any(self.lead is not None and self.lead.interrupted)

    def print_line(self, text: str) -> None:
        """Print a line on rank 0 that the live line does not overwrite. Not collective."""
        if self.lead is not None:
            self.lead.progress.note(text)

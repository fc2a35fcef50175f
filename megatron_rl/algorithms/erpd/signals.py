"""Log-probabilities of a round's batch under teachers and denominators, and token advantages computed from them."""

from functools import partial

import numpy as np

from megatron_rl.algorithms.erpd.round_folder import TEACHER_COLUMN, RoundFolder
from megatron_rl.algorithms.erpd.statistics import negative_on_positives, raw_signal
from megatron_rl.objectives.advantages import whiten_tokens
from megatron_rl.plan.erpd_plan import ERPDPlan, SignalPlan
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.types import Batch


class Signals:
    """The token advantages of stage 2. All methods are collective.

    Args:
        plan: the round's plan.
        policy: computes log-probabilities with loaded weights.
        folder: the round's folder, which stores the log-probabilities.
        batch: the round's batch.
        teacher: checkpoints of the teacher, by its updates.
        run: checkpoints of the run, by its steps.
    """

    def __init__(
        self, plan: ERPDPlan, policy: Policy, folder: RoundFolder, batch: Batch, teacher: Checkpoints, run: Checkpoints
    ) -> None:
        self._plan, self._policy, self._mesh, self._folder = plan, policy, policy.mesh, folder
        self._bare = batch.with_columns(logold=None, logref=None)  # for scoring, which needs only tokens
        self._batch, self._teacher, self._run = batch, teacher, run
        self._trained = batch.mask > 0
        self._token_rewards = np.repeat(batch.rewards, batch.lengths)
        self._signal, self._advantages = -1, batch

    def score(self) -> None:
        """Write log-probabilities of the batch under every teacher and denominator to disk, unless they are there."""
        wanted: dict[str, tuple[Checkpoints, int]] = {}
        for signal in self._plan.signals:
            wanted[teacher_column(self._plan.teacher_at(signal))] = self._teacher, self._plan.teacher_at(signal)
            if signal.unlearned is not None:
                wanted[teacher_column(signal.unlearned)] = self._teacher, signal.unlearned
            if signal.student is not None:
                wanted[signal.denominator] = self._run, signal.student
        wanted[teacher_column(self._plan.teacher_updates)] = self._teacher, self._plan.teacher_updates
        known = self._mesh.on_lead(lambda: list(self._folder.columns()))
        for name, (checkpoints, number) in wanted.items():
            if name not in known:
                checkpoints.load_weights(number)
                self._mesh.on_lead(partial(self._folder.add_column, name, self._policy.logprobs(self._bare)))

    def batch_of(self, update: int) -> Batch:
        """Return the batch with the token advantages of student update number `update`.

        They are computed once per signal, or at every update if the signal's denominator is "moving".
        """
        signal = self._plan.signal_of(update)
        number = self._plan.signals.index(signal)
        if signal.denominator == "moving":
            moving = self._policy.logprobs(self._bare)
        elif number == self._signal:
            return self._advantages
        else:
            moving = None
        advantages = self._mesh.keep_on_lead(lambda: self._token_advantages(signal, moving), lambda found: found[:0])
        self._signal, self._advantages = number, self._batch.with_columns(token_advantages=advantages)
        return self._advantages

    def _token_advantages(self, signal: SignalPlan, moving: np.ndarray | None) -> np.ndarray:
        """Return token advantages [N] float32, whitened over the trained tokens of the whole batch."""
        columns = self._folder.columns()
        loge = columns[teacher_column(self._plan.teacher_at(signal))]
        if moving is not None:
            logden = moving
        elif signal.unlearned is not None:
            logden = columns[teacher_column(signal.unlearned)]
        else:
            logden = columns[signal.denominator]
        raw = raw_signal(loge, logden, self._plan.floor)
        if self._plan.outliers == "negative_on_positives":
            raw = negative_on_positives(raw, self._token_rewards)
        return whiten_tokens(raw, self._trained).astype(np.float32)


def teacher_column(updates: int) -> str:
    """Return the name of the column of the teacher after `updates` updates."""
    return f"{TEACHER_COLUMN}{updates}"

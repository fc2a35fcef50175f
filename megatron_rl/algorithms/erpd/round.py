"""Extreme Region Policy Distillation, one round a step (arXiv 2605.25582).

A round samples one batch D from pi_old and learns from it twice. Stage 1 moves a teacher far away from pi_old on D.
Stage 2 starts from pi_old again and follows the teacher's token signal, log pi_e - log pi_den, under a clip. Every
log-probability is the trainer's own; the engines are offloaded while the stages run. A round can be resumed at any
point.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from megatron_rl.algorithms.erpd.records import RoundRecords, mu_record, round_record
from megatron_rl.algorithms.erpd.round_folder import STAGES, TEACHER_RATES, RoundFolder
from megatron_rl.algorithms.erpd.signals import Signals, teacher_column
from megatron_rl.algorithms.erpd.stage import Stage, run_stage
from megatron_rl.algorithms.policy_gradient import with_columns
from megatron_rl.config import Config
from megatron_rl.config.old_keys import rename_old_keys
from megatron_rl.errors import CheckpointError, ConfigError, UserError
from megatron_rl.plan.erpd_plan import ERPDPlan
from megatron_rl.policy.checkpoint import Checkpoints, parameter_digest
from megatron_rl.trainer.lead import Lead
from megatron_rl.trainer.metrics import Stopwatch
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.types import Batch

OUTCOMES = ("erpd_mse", "erpd_ce")  # teachers that use the reward as a probability
TEACHER, STUDENT = STAGES


class ERPD:
    """The algorithm of `objective.name: erpd`."""

    def __init__(self, plan: ERPDPlan) -> None:
        self.plan = plan

    def collect(self, trainer: Trainer, watch: Stopwatch) -> Batch:
        """Return the round's batch: sampled the first time, and read from disk when the round is resumed. Collective.

        The checkpoint of pi_old is complete before the batch is sampled.
        """
        trainer.ensure_saved()
        step, version = trainer.state.step, trainer.state.version
        folder = _folder(trainer, step)
        found = trainer.mesh.keep_on_lead(folder.read_batch, _without_rows)
        if found is not None:
            batch, sampling = found
            trainer.on_lead(lambda lead: lead.rollouts.restore(step, version, sampling))
            return batch
        batch = trainer.collect(watch)
        trainer.on_lead(lambda lead: folder.write_batch(batch, lead.rollouts.sampling))
        return batch

    def learn(self, trainer: Trainer, batch: Batch, watch: Stopwatch) -> RoundRecords:
        """Run both stages. Afterwards the policy is the student, and the engines wait for its weights. Collective.

        Raises:
            CheckpointError: pi_old is not the policy that the round began with.
            KeyboardInterrupt: a stop was requested.
        """
        return _Round(trainer, self.plan, batch, watch).learn()


def round_settings(config: Config, plan: ERPDPlan) -> dict[str, Any]:
    """Return every setting that a round's outcome depends on, by key.

    A round must end with the settings it was begun with.
    """
    sections = {"objective": plan, "optimizer": config.optimizer}
    asked = {
        f"{name}.{key}": value for name, part in sections.items() for key, value in part.model_dump(mode="json").items()
    }
    return asked | {
        "objective.advantage": config.objective.advantage,
        "objective.overlong_buffer": config.objective.overlong_buffer,
        "model.path": str(config.model.path),
        "model.reference": None if config.model.reference is None else str(config.model.reference),
        "precision.train": config.precision.train,
        "rollout.temperature": config.rollout.temperature,
        "run.seed": config.run.seed,
    }


def with_new_names(asked: dict[str, Any]) -> dict[str, Any]:
    """Return noted settings of a round with the present names of their keys; an earlier version may have noted them."""
    tree: dict[str, Any] = {}
    for key, value in asked.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = dict(value) if isinstance(value, dict) else value
    rename_old_keys(tree)
    return {f"{section}.{name}": value for section, block in tree.items() for name, value in block.items()}


def _without_rows(found: tuple[Batch, dict[str, Any]] | None) -> tuple[Batch, dict[str, Any]] | None:
    return None if found is None else (found[0].without_rows(), found[1])


def _without_entries(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values[:0] for name, values in columns.items()}


def _folder(trainer: Trainer, step: int) -> RoundFolder:
    return RoundFolder(trainer.config.run.folder / "erpd", step)


class _Round:
    def __init__(self, trainer: Trainer, plan: ERPDPlan, batch: Batch, watch: Stopwatch) -> None:
        self.trainer, self.plan, self.watch = trainer, plan, watch
        self.mesh, self.policy, self.step = trainer.mesh, trainer.policy, trainer.state.step
        self.folder = _folder(trainer, self.step)
        self.trained = batch.mask > 0
        self.token_rewards = np.repeat(batch.rewards, batch.lengths)
        self.teacher_objective, self.student_objective = plan.teacher_objective(), plan.student_objective()
        self.bare = batch
        keep = trainer.config.run.keep
        pinned = (*plan.kept, plan.teacher_updates)
        guard = trainer.checkpoints.guard
        self.teacher = Checkpoints(self.folder.path / TEACHER, self.policy, keep, pinned, guard)
        self.student = Checkpoints(self.folder.path / STUDENT, self.policy, keep, guard=guard)

    def learn(self) -> RoundRecords:
        """Run both stages and return their results."""
        trainer, plan = self.trainer, self.plan
        self._begin()
        trainer.on_lead(Lead.offload_engines)
        trainer.holds_step_weights = False
        self.batch = self._with_own_columns()
        signals = Signals(plan, self.policy, self.folder, self.batch, self.teacher, trainer.checkpoints)
        with self.watch("teacher"), self.teacher:
            if not self.teacher.has(plan.teacher_updates):
                run_stage(trainer, self.folder, self._teacher_stage())
            signals.score()
        rates = self._evaluate_teacher()
        with self.watch("student"), self.student:
            run_stage(trainer, self.folder, self._student_stage(signals))
            logp = self.policy.logprobs(self.batch)
        trainer.on_lead(Lead.reload_engines)
        record, student, ratios = self.mesh.on_lead(lambda: self._record(logp))
        record |= {f"erpd/teacher/{name.removeprefix('eval/')}": rate for name, rate in rates.items()}
        assert self.batch.logold is not None  # `_with_own_columns` makes it
        return RoundRecords(self.bare, self.batch.logold, student, self.student_objective, record, ratios)

    def _begin(self) -> None:
        """Write pi_old's digest and the settings of the round, or compare them with those on disk.

        Remove the checkpoints of previous rounds.
        """
        digest = parameter_digest(self.policy)
        asked = round_settings(self.trainer.config, self.plan)
        self.mesh.on_lead(lambda: self._note_beginning(digest, asked))

    def _note_beginning(self, digest: dict[str, str], asked: dict[str, Any]) -> None:
        self._check_rewards()
        for earlier in range(self.step):
            _folder(self.trainer, earlier).drop_checkpoints()
        note = self.folder.note()
        if not note:
            self.folder.add_note(asked=asked, digest=digest)
            return
        begun = with_new_names(note["asked"])
        other = [key for key, value in asked.items() if begun.get(key) != value]
        if other:
            raise ConfigError(
                f"the round in {self.folder.path} was begun with other settings ({', '.join(other)}): resume with "
                f"those, or {self.folder.mend}"
            )
        if not note["digest"].keys() & digest.keys():  # another layout: the same weights in other shards
            self.folder.add_note(digest={**note["digest"], **digest})
        self._compare(self.folder.note()["digest"], digest)

    def _compare(self, noted: dict[str, str], digest: dict[str, str]) -> None:
        for rank, text in digest.items():
            if noted[rank] != text:
                raise CheckpointError(
                    f"the parameters of {rank} have digest {text[:12]}, but the round in {self.folder.path} began with "
                    f"{noted[rank][:12]}: {self.trainer.checkpoints.path(self.step)} is not the policy that sampled "
                    f"its batch; restore that checkpoint, or {self.folder.mend}"
                )

    def _check_rewards(self) -> None:
        bad = self.bare.ids[(self.bare.rewards < 0) | (self.bare.rewards > 1)].tolist()
        if bad and self.teacher_objective.name in OUTCOMES:
            raise UserError(
                f"rewards of trajectories {bad[:20]} lie outside [0, 1], but {self.teacher_objective.name} takes them "
                "for probabilities: fix the verifier, or use another teacher"
            )

    def _with_own_columns(self) -> Batch:
        """Return the batch with log-probabilities under pi_old, and under the reference if an objective needs them."""
        known = self.mesh.keep_on_lead(self.folder.columns, _without_entries)
        batch = self.bare.with_columns(logold=known.get("old"), logref=known.get("ref"))
        needs = self.teacher_objective.needs | self.student_objective.needs | {"logold"}
        batch = with_columns(self.policy, batch, needs)
        for name, column in (("old", batch.logold), ("ref", batch.logref)):
            if column is not None and name not in known:
                self.mesh.on_lead(partial(self.folder.add_column, name, column))
        return batch

    # Stages ------------------------------------------------------------------------------------------------

    def _teacher_stage(self) -> Stage:
        plan, lr = self.plan, self.trainer.config.optimizer.lr
        return Stage(
            name=TEACHER,
            updates=plan.teacher_updates,
            lr=plan.teacher_lr or lr,
            objective=self.teacher_objective,
            batch=lambda _: self.batch,
            checkpoints=self.teacher,
            save_every=plan.save_every,
            restart=self._restart_teacher,
            kept=plan.kept,
        )

    def _student_stage(self, signals: Signals) -> Stage:
        return Stage(
            name=STUDENT,
            updates=self.plan.student_updates,
            lr=self.trainer.config.optimizer.lr,
            objective=self.student_objective,
            batch=signals.batch_of,
            checkpoints=self.student,
            save_every=self.plan.save_every,
            restart=self._restart,
        )

    def _restart(self) -> None:
        """Restore pi_old, and check its digest."""
        self.trainer.checkpoints.load(self.step)
        digest = parameter_digest(self.policy)
        self.mesh.on_lead(lambda: self._compare(self.folder.note()["digest"], digest))

    def _restart_teacher(self) -> None:
        """Restore pi_old, and remove the measurements of the previous teacher, which are not valid for the next one."""
        self.mesh.on_lead(self.folder.forget_teacher)
        self._restart()

    # Reporting ---------------------------------------------------------------------------------------------

    def _evaluate_teacher(self) -> dict[str, float]:
        """Return held-out pass rates of the teacher if the step's evaluation is due; else an empty dict.

        The rates are measured once. The teacher's weights are published as a version of their own, so the student's
        version comes after it.
        """
        trainer = self.trainer
        if trainer.config.eval.prompts == 0 or not trainer.due(self.step + 1, trainer.config.eval.every):
            return {}
        rates: dict[str, float] | None = self.mesh.on_lead(lambda: self.folder.note().get(TEACHER_RATES))
        trainer.state = replace(trainer.state, version=trainer.state.version + 1)
        if rates is None:
            with self.watch("teacher_eval"):
                self.teacher.load_weights(self.plan.teacher_updates)
                trainer.on_lead(Lead.reload_engines)
                trainer.publish(trainer.state.version)
                rates = trainer.on_lead(lambda lead: lead.rollouts.evaluate(self.step + 1).rates)
                self.mesh.on_lead(lambda: self.folder.add_note(**{TEACHER_RATES: rates}))
                trainer.on_lead(Lead.offload_engines)
        assert rates is not None
        self.trainer.print_line(
            f"step {self.step}: teacher, " + ", ".join(f"{k.removeprefix('eval/')} {v:.1%}" for k, v in rates.items())
        )
        return rates

    def _record(self, logp: np.ndarray) -> tuple[dict[str, Any], list[dict[str, float]], dict[str, float]]:
        """Return the round's record, the records of the student's updates, and the ratios to mu.

        `logp` [N] are the student's log-probabilities.
        """
        columns = self.folder.columns()
        teacher = self.folder.updates(TEACHER, self.plan.teacher_updates)
        student = self.folder.updates(STUDENT, self.plan.student_updates)
        record = round_record(
            teacher=teacher,
            student=student,
            logold=columns["old"],
            loge=columns[teacher_column(self.plan.teacher_updates)],
            logp=logp,
            rewards=self.token_rewards,
            trained=self.trained,
            outcome=self.teacher_objective.name == "erpd_mse",
        )
        return record, student, mu_record(self.bare, columns["old"], logp)

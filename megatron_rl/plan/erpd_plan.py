"""The plan of `objective.name: erpd`, checked before anything is allocated (arXiv 2605.25582)."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_rl.config.block import Block
from megatron_rl.errors import ConfigError, did_you_mean, shorten
from megatron_rl.objectives import OBJECTIVES, Objective, make_objective, objective_class
from megatron_rl.objectives.erpd import ErpdMSE
from megatron_rl.objectives.ratio import RatioObjective

NAME = "erpd"
STUDENT = "erpd_distill"
_KEEP = (10, 20, 30)
_DENOMINATORS = ("old", "unlearned@k", "student@j", "moving")
_ENGINE = {
    "logmu": "its log-probabilities are never mixed in",
    "topk": "an engine's top-K is not part of the fixed batch",
    "staleness": "the batch is sampled by the very policy it starts from",
}


class SignalPlan(Block):
    """One signal of stage 2: log pi_e - log pi_den, followed for `updates` optimizer updates.

    Attributes:
        teacher: the checkpoint that is pi_e: "last", or a number of teacher updates.
        denominator: the policy that is pi_den.
        updates: student updates that follow the signal.
    """

    teacher: Literal["last"] | int = Field(
        "last", description="last, or the teacher's checkpoint after that many updates"
    )
    denominator: str = Field("old", description="old | unlearned@k | student@j | moving")
    updates: int = Field(16, ge=1, description="student updates that follow the signal")

    @field_validator("teacher")
    @classmethod
    def _trained(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"it is {value}, but a teacher has made at least 1 update")
        return value

    @field_validator("denominator")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ("old", "moving") and not re.fullmatch(r"(unlearned|student)@\d+", value):
            raise ValueError(
                f"it is {value!r}; {did_you_mean(value, _DENOMINATORS)} (k teacher updates, j steps of the run)"
            )
        if re.fullmatch(r"unlearned@0+", value):
            raise ValueError(f"it is {value!r}, but k is at least 1: before its first update the teacher is old")
        return value

    @property
    def unlearned(self) -> int | None:
        """Teacher updates of the denominator's checkpoint; None if it is not one of the teacher's."""
        return self._number("unlearned")

    @property
    def student(self) -> int | None:
        """Steps of the run of the denominator's checkpoint; None if it is not an older student."""
        return self._number("student")

    def _number(self, kind: str) -> int | None:
        name, _, number = self.denominator.partition("@")
        return int(number) if name == kind else None


class ERPDPlan(Block):
    """One round: `teacher_updates` of the teacher's objective on a fixed batch, then the signals, from pi_old again.

    Attributes:
        teacher: objective of stage 1: its name and keys.
        teacher_updates: optimizer updates of stage 1.
        teacher_lr: learning rate of stage 1; None: optimizer.lr.
        keep: updates after which teacher checkpoints are kept; None: 10, 20, 30, as far as stage 1 reaches.
        save_every: updates between resumable checkpoints inside a stage.
        signals: the signals of stage 2, followed one after the other.
        outliers: treatment of token signals that are outliers.
        floor: lower bound of a teacher's log-probabilities.
        student: keys of the student's objective.
    """

    teacher: dict[str, Any] = Field(description="objective of stage 1: name and keys")
    teacher_updates: int = Field(50, ge=1, description="optimizer updates of stage 1")
    teacher_lr: float | None = Field(None, gt=0, description="default: optimizer.lr")
    keep: tuple[int, ...] | None = Field(None, description="teacher checkpoints kept, in updates; default: 10, 20, 30")
    save_every: int = Field(10, ge=1, description="updates between resumable checkpoints inside a stage")
    signals: tuple[SignalPlan, ...] = Field(
        (SignalPlan(),),
        min_length=1,
        description="followed one after the other; default: one, over the first of keep for erpd_mse, else over old",
    )
    outliers: Literal["none", "negative_on_positives"] = Field(
        "none", description="negative_on_positives: no positive signal on tokens of positive trajectories"
    )
    floor: float = Field(-20.0, lt=0, description="least log-probability of a teacher")
    student: dict[str, Any] = Field(default_factory=dict, description=f"keys of {STUDENT}")

    @field_validator("teacher")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "name" not in value:
            raise ValueError("it has no name: give an objective, e.g. {name: erpd_mse}")
        if value["name"] in (NAME, STUDENT):
            raise ValueError(f"{value['name']} cannot be a teacher: it needs one")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        late = [k for k in self.keep or () if not 0 < k <= self.teacher_updates]
        if late:
            raise ValueError(f"keep names update {late[0]}, but the teacher makes updates 1 to {self.teacher_updates}")
        if "signals" not in self.model_fields_set and self.teacher["name"] == ErpdMSE.name:
            object.__setattr__(self, "signals", (SignalPlan(denominator=f"unlearned@{self._first_kept()}"),))
        for at, signal in enumerate(self.signals):
            for key, k in (("teacher", signal.teacher), ("denominator", signal.unlearned)):
                if isinstance(k, int) and k not in (*self.kept, self.teacher_updates):
                    raise ValueError(
                        f"signals.{at}.{key} is the teacher after {k} updates, which is not kept: "
                        f"add {k} to keep = {self.kept}"
                    )
        return self

    def _first_kept(self) -> int:
        if not self.kept or self.kept[0] == self.teacher_updates:
            raise ValueError(
                f"{ErpdMSE.name} is measured against an early checkpoint of its own, but keep = {self.kept} names none "
                f"before its last update {self.teacher_updates}: add one, or say what to measure against in signals"
            )
        return self.kept[0]

    @property
    def kept(self) -> tuple[int, ...]:
        """Updates after which teacher checkpoints are kept, in ascending order."""
        return tuple(
            sorted(set(self.keep if self.keep is not None else [k for k in _KEEP if k <= self.teacher_updates]))
        )

    @property
    def student_updates(self) -> int:
        """Number of optimizer updates of stage 2."""
        return sum(signal.updates for signal in self.signals)

    @property
    def older_students(self) -> tuple[int, ...]:
        """Steps of the run whose checkpoints are denominators, in ascending order."""
        return tuple(sorted({signal.student for signal in self.signals if signal.student is not None}))

    def teacher_at(self, signal: SignalPlan) -> int:
        """Return the teacher updates of the checkpoint that is a signal's numerator."""
        return self.teacher_updates if signal.teacher == "last" else signal.teacher

    def signal_of(self, update: int) -> SignalPlan:
        """Return the signal that student update number `update` (from 0) follows.

        Raise IndexError after the last update.
        """
        left = update
        for signal in self.signals:
            if left < signal.updates:
                return signal
            left -= signal.updates
        raise IndexError(f"the student makes {self.student_updates} updates")

    def teacher_objective(self) -> Objective:
        """Return the objective of stage 1.

        The denominator of a ratio is the trainer's old policy unless `ratio_denominator` names another.

        Raises:
            ConfigError: the objective is illegal, or needs something from the engines.
        """
        kind = _ratio(self.teacher["name"])
        if kind is None:
            return _without_engine("teacher", make_objective(self.teacher))
        if kind.always_over_mu:
            raise ConfigError(
                f"objective.teacher: {kind.name} cannot be a teacher: its loss is always weighted by pi / mu, but in "
                f"erpd {_ENGINE['logmu']}; take one of {', '.join(_teachers())}"
            )
        return _without_engine("teacher", make_objective(_over_old(self.teacher)))

    def student_objective(self) -> Objective:
        """Return the objective of stage 2.

        Raises:
            ConfigError: a key is illegal, or the objective needs something from the engines.
        """
        if "name" in self.student:
            raise ConfigError(f"objective.student has a name; it is {STUDENT} always: remove the key")
        return _without_engine("student", make_objective({"name": STUDENT, **self.student}))


def make_plan(spec: Mapping[str, Any]) -> ERPDPlan:
    """Return the plan of `{"name": "erpd", ...}`, with its objectives checked.

    Raises:
        ConfigError: a key or value is illegal. The message names the nearest valid name.
    """
    try:
        plan = ERPDPlan(**{key: value for key, value in spec.items() if key != "name"})
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from error
    plan.teacher_objective()
    plan.student_objective()
    return plan


def _ratio(name: str) -> type[RatioObjective] | None:
    """Return the class of the objective `name`; None if it does not use a ratio."""
    kind = objective_class(name)
    return kind if issubclass(kind, RatioObjective) else None


def _over_old(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {**spec, "ratio_denominator": spec.get("ratio_denominator") or "trainer_old"}


def _teachers() -> list[str]:
    """Return the names of objectives that can be a teacher without any key except their name."""
    names = []
    for name in OBJECTIVES:
        kind = _ratio(name)
        if name == STUDENT or (kind is not None and kind.always_over_mu):
            continue
        made = make_objective({"name": name} if kind is None else _over_old({"name": name}))
        if not made.needs & _ENGINE.keys():
            names.append(name)
    return sorted(names)


def _without_engine(key: str, objective: Objective) -> Objective:
    for tensor, why in _ENGINE.items():
        if tensor in objective.needs:
            raise ConfigError(
                f"objective.{key}: {objective.name} needs '{tensor}' of the engine, but in erpd {why}; "
                "set ratio_denominator: trainer_old, or leave out what needs it"
            )
    return objective


def _explain(item: Any) -> str:
    where = [str(part) for part in item["loc"]]
    key = ".".join(("objective", *where))
    if item["type"] == "extra_forbidden":
        known = (SignalPlan if where[0] == "signals" else ERPDPlan).model_fields
        return f"unknown key '{key}'; {did_you_mean(where[-1], known)}"
    if item["type"] == "missing":
        return f"key '{key}' is missing and has no default"
    if item["type"] == "value_error":
        return f"{key}: {item.get('ctx', {}).get('error', item['msg'])}"
    return f"'{key}' is {shorten(repr(item['input']))}: {item['msg']}"

"""An objective of the user's own: found by its import path, checked as the built-in ones are."""

from pathlib import Path

import pytest
import torch

from megatron_rl.config import make_config
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import LossInputs, make_objective
from megatron_rl.plan import plan_algorithm
from megatron_rl.types import COLUMNS

OWN = """\
from dataclasses import dataclass

from megatron_rl.objectives import Objective, TokenLoss, positive


@dataclass(frozen=True, kw_only=True)
class Own(Objective):
    scale: float = positive(2.0, "factor of the loss")
    shift: float = 0.0

    @property
    def needs(self):
        return super().needs | {"logmu"}

    def per_token(self, x):
        return TokenLoss(-self.scale * x.advantages * (x.logp - x.logmu) + self.shift)
"""
RATIO = """\
from dataclasses import dataclass

from megatron_rl.objectives import RatioObjective, TokenLoss


@dataclass(frozen=True, kw_only=True)
class Plain(RatioObjective):
    def surrogate(self, x):
        ratio = x.ratio(self.below)
        return TokenLoss(-x.advantages * ratio, weight=ratio.detach() * 0 + 1)
"""


@pytest.fixture
def own(tmp_path: Path):
    """A function that writes a file of Python, and returns the import path of a class in it."""

    def write(text: str, name: str = "Own") -> str:
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
        return f"{tmp_path / 'mine.py'}:{name}"

    return write


def test_a_class_is_built_from_its_keys_and_computes(own):
    objective = make_objective({"name": own(OWN), "scale": 3, "shift": "0.5", "norm": "token_mean"})
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mu, mask = torch.tensor([[-1.5, -2.0]]), torch.ones(1, 2)
    out = objective(LossInputs(logp, mu, torch.tensor([2.0]), mask))
    assert out.loss.item() == pytest.approx((-3 * 2 * 0.5 + 2 * 0.5) / 2)
    assert (objective.name, objective.needs) == ("Own", {"logmu"})


def test_a_class_may_need_a_column_that_its_file_declares(own):
    declared = "from megatron_rl.types import COLUMNS, Column\n"
    declared += 'COLUMNS["draft"] = Column("draft", "float32", "x", sampled=True, answer_key="draft_scores")\n'
    body = OWN.replace('{"logmu"}', '{"logmu", "draft"}').replace("x.logp -", 'x.columns["draft"] * x.logp -')
    try:
        objective = make_objective({"name": own(declared + body), "norm": "token_mean"})
        logp, mu = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]])
        draft = {"draft": torch.tensor([[2.0, 3.0]])}
        out = objective(LossInputs(logp, mu, torch.tensor([2.0]), torch.ones(1, 2), columns=draft))
        assert out.loss.item() == pytest.approx(-2 * 2 * ((-2 + 1.5) + (-6 + 2)) / 2)
        with pytest.raises(UserError, match="needs 'draft', which is missing"):
            objective(LossInputs(logp, mu, torch.tensor([2.0]), torch.ones(1, 2)))
    finally:
        COLUMNS.pop("draft", None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scal": 1}, r"objective Own has no key 'scal'; did you mean 'scale'\?"),
        ({"scale": -1}, r"objective Own: 'scale' is -1; it must be finite, above 0"),
        ({"shift": "much"}, r"objective Own: 'shift' is 'much': Input should be a valid number"),
        ({"norm": "token_maen"}, "token_mean"),
    ],
)
def test_keys_are_checked_also_those_of_plain_fields(own, keys, message):
    with pytest.raises(ConfigError, match=message):
        make_objective({"name": own(OWN), **keys})


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (OWN, "Owm", r"objective.name: .* has no 'Owm'; did you mean 'Own'\?"),
        ("class Own: ...\n", "Own", r"Own \(.*mine.py:1\) is no subclass of megatron_rl.objectives.Objective"),
        ("def Own(x): ...\n", "Own", r"Own \(.*mine.py:1\) is no subclass"),
        (OWN.replace("def per_token", "def per_tokne"), "Own", r"Own \(.*mine.py:6\) has no method per_token"),
        (OWN.replace("@dataclass(frozen=True, kw_only=True)\n", ""), "Own", r"Own \(.*mine.py:6\) has options"),
        (OWN.replace("frozen=True, ", ""), "Own", r"importing .*mine.py:6 raised TypeError: cannot inherit non-frozen"),
        (OWN.replace("shift: float = 0.0", "shift: float"), "Own", r"objective.shift is missing and has no default"),
        (OWN.replace('{"logmu"}', '{"logmw"}'), "Own", r"Own \(.*:6\) needs 'logmw'; did you mean 'logmu'\?"),
        (OWN + "\n    def __post_init__(self):\n        1 / 0\n", "Own", r"raised ZeroDivisionError: .*mine.py:19\)"),
        ("class Own(\n", "Own", r"importing .*mine.py:1 raised SyntaxError"),
    ],
)  # fmt: skip
def test_a_class_that_is_no_objective_is_refused_with_file_and_line(own, text, name, message):
    with pytest.raises(ConfigError, match=message):
        make_objective({"name": own(text, name)})


def config(name: str, **sections):
    return make_config({"model": {"path": "m"}, "objective": {"name": name}, **sections})


def test_perturbation_goes_with_a_ratio_of_the_users_own_only(own, tmp_path):
    plan = plan_algorithm(config(own(RATIO, "Plain"), alp={"enabled": True}))
    assert plan.objective.name == "Plain" and plan.objective.needs == {"logmu"}
    (tmp_path / "other.py").write_text(OWN)
    with pytest.raises(ConfigError, match=r"alp.enabled is true, but objective Own uses no importance ratio"):
        plan_algorithm(config(f"{tmp_path}/other.py:Own", alp={"enabled": True}))


def test_an_objective_of_the_users_own_may_be_a_teacher(own):
    sections = {"objective": {"name": "erpd", "teacher": {"name": own(RATIO, "Plain")}}}
    plan = plan_algorithm(make_config({"model": {"path": "m"}, **sections}))
    assert plan.erpd is not None and plan.erpd.teacher_objective().below == "logold"

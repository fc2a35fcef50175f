"""A folder of the reference policy that cannot score the run's samples is refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import make_config
from megatron_rl.errors import CheckpointError, ConfigError
from megatron_rl.plan import RunPlan, resolve_run
from tests.e2e.models import ARITHMETIC, make_arithmetic_mixture, make_arithmetic_model, make_model
from tests.unit.tasks.char_tokenizer import char_tokenizer

OPD = {"name": "opd"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_arithmetic_model(tmp_path_factory.mktemp("student") / "hf")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_model(tmp_path / "teacher", char_tokenizer(ARITHMETIC), seed=1)


def planned(student: Path, teacher: Path | None, objective: dict[str, Any], **sections: Any) -> RunPlan:
    """Return the plan of a run on `student` with the reference `teacher`."""
    config = make_config(
        {"model": {"path": str(student), "reference": teacher and str(teacher)}, "objective": objective, **sections}
    )
    plan = resolve_run(config)
    assert teacher is None or f"reference policy: {teacher}" in plan.lines(config)
    return plan


def change(folder: Path, **keys: Any) -> None:
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    "objective",
    [
        OPD,
        {"name": "drpo", "kl_coef": 0.1},
        {"name": "erpd", "teacher": {"name": "erpd_mse", "kl_coef": 0.1}},
        {"name": "erpd", "teacher": OPD},
    ],
    ids=["opd", "kl", "erpd_kl", "erpd_opd"],
)
def test_a_folder_of_the_same_architecture_is_a_reference_for_what_compares_with_one(student, teacher, objective):
    change(teacher, max_position_embeddings=4096, architectures=["Qwen3ForCausalLM"])
    assert planned(student, teacher, objective).algorithm.needs_reference


@pytest.mark.parametrize("objective", [OPD, {"name": "erpd", "teacher": OPD}], ids=["opd", "erpd"])
def test_distillation_without_a_teacher_or_from_itself_is_refused(student, objective):
    with pytest.raises(ConfigError, match=r"needs a teacher: set model\.reference"):
        planned(student, None, objective)
    with pytest.raises(ConfigError, match=r"model\.reference is model\.path .*give another folder"):
        planned(student, student / ".." / "hf", objective)


def test_a_reference_that_nothing_needs_is_refused(student, teacher):
    with pytest.raises(ConfigError, match=r"model\.reference is set, but objective drpo compares with no reference"):
        planned(student, teacher, {"name": "drpo"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: make_model(folder, char_tokenizer(ARITHMETIC), layers=3), "num_layers 3 instead of 2"),
        (lambda folder: make_model(folder, char_tokenizer(ARITHMETIC + "9")), "vocab_size 10 instead of 9"),
        (make_arithmetic_mixture, "architecture Qwen3MoeForCausalLM instead of Qwen3ForCausalLM"),
    ],
    ids=["layers", "vocabulary", "family"],
)
def test_another_architecture_is_refused_by_the_first_size_that_differs(student, tmp_path, make, message):
    with pytest.raises(ConfigError, match=message):
        planned(student, make(tmp_path / "other"), OPD)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, r"rope\.theta 500000"),
        ({"rms_norm_eps": 1e-3}, r"norm_eps 0\.001 instead of"),
        ({"max_position_embeddings": 16}, r"exceeds max_position_embeddings = 16 of model\.reference"),
    ],
    ids=["rope", "norm", "positions"],
)
def test_a_setting_that_changes_scores_is_refused(student, teacher, keys, message):
    change(teacher, **keys)
    with pytest.raises(ConfigError, match=message):
        planned(student, teacher, OPD)


def test_a_teacher_whose_tokens_are_others_or_missing_or_damaged_is_refused(student, teacher):
    other = char_tokenizer("".join(reversed(ARITHMETIC)))
    other.save_pretrained(teacher)
    with pytest.raises(ConfigError, match=r"has '.' as token \d, and .* has '.': .*same tokenizer"):
        planned(student, teacher, OPD)
    char_tokenizer(ARITHMETIC[:-1]).save_pretrained(teacher)
    with pytest.raises(ConfigError, match=r"tokenizer has None as token 8, and .* has '='"):
        planned(student, teacher, OPD)
    (teacher / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model\.reference .*the tokenizer cannot be loaded"):
        planned(student, teacher, OPD)


def test_a_teacher_that_is_no_folder_is_refused_by_its_path(student, tmp_path):
    with pytest.raises(CheckpointError, match=r"no model folder at .*nowhere"):
        planned(student, tmp_path / "nowhere", OPD)

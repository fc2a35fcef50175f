"""A study file becomes cells with readable ids, or is refused by file, line and key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.errors import ConfigError
from megatron_rl.study.grid import Cell, arms_of, make_cells
from megatron_rl.study.study_file import load_study

BASE: dict[str, Any] = {"model": {"path": "m"}, "objective": {"name": "grpo", "clip_low": 0.2}, "run": {"seed": 9}}
AXES = {
    "precision.rollout": ["bf16", "fp8_blockwise"],
    "arm": {"grpo": {}, "drpo": {"objective": {"name": "drpo"}, "optimizer.lr": 1.0e-4}},
}


def cells(place: Path, **keys: Any) -> list[Cell]:
    """Return the cells of a study with these keys, read from a file."""
    path = place / "mine.yaml"
    tree = {"base": BASE, "budget": {"steps": 5}, **keys}
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    study, base = load_study(path)
    return make_cells(study, base, place)


def test_cells_are_the_product_of_axes_and_seeds_in_their_order(tmp_path):
    found = cells(tmp_path, axes=AXES, seeds=[0, 1])
    assert [cell.id for cell in found] == [
        f"{precision}+{arm}-s{seed}"
        for precision in ("bf16", "fp8_blockwise")
        for arm in ("grpo", "drpo")
        for seed in (0, 1)
    ]
    assert arms_of(found) == ["bf16+grpo", "bf16+drpo", "fp8_blockwise+grpo", "fp8_blockwise+drpo"]
    assert dict(found[3].axes) == {"precision.rollout": "bf16", "arm": "drpo"} and found[3].seed == 1


def test_a_setting_is_an_override_so_a_section_replaces_the_whole_section(tmp_path):
    grpo, drpo = (cell.tree for cell in cells(tmp_path, axes=AXES, only=[{"precision.rollout": "fp8_blockwise"}]))
    assert grpo["objective"] == BASE["objective"] and grpo["precision"] == {"rollout": "fp8_blockwise"}
    assert drpo["objective"] == {"name": "drpo"} and drpo["optimizer"] == {"lr": 1.0e-4}
    assert BASE["objective"] == {"name": "grpo", "clip_low": 0.2}, "a cell must not change the base of the next one"


def test_the_study_sets_seed_steps_and_folder(tmp_path):
    (cell,) = cells(tmp_path, seeds=[4], folder=str(tmp_path / "out"))
    assert cell.id == "all-s4"
    assert cell.tree["run"] == {"seed": 4, "steps": 5, "dir": str(tmp_path / "out"), "name": "runs/all-s4"}


def test_a_warm_start_may_depend_on_the_seed(tmp_path):
    found = cells(tmp_path, settings={"model.path": "warm-{seed}"}, seeds=[0, 7])
    assert [cell.tree["model"]["path"] for cell in found] == ["warm-0", "warm-7"]


def test_the_size_is_no_part_of_the_arm(tmp_path):
    sizes = {"small": {"model.path": "s"}, "large": {"model.path": "l"}}
    found = cells(tmp_path, axes={"size": sizes, "optimizer.lr": [1.0e-3]}, size="size")
    assert [(cell.id, cell.arm, cell.size) for cell in found] == [
        ("lr=0.001-small-s0", "lr=0.001", "small"),
        ("lr=0.001-large-s0", "lr=0.001", "large"),
    ]


def test_constraints_keep_and_leave_out(tmp_path):
    rules = {
        "only": [{"arm": "grpo"}, {"arm": "drpo", "seed": 0}],
        "exclude": [{"precision.rollout": ["bf16"], "seed": [1]}],
    }
    found = [cell.id for cell in cells(tmp_path, axes=AXES, seeds=[0, 1], **rules)]
    assert found == ["bf16+grpo-s0", "bf16+drpo-s0", "fp8_blockwise+grpo-s0", "fp8_blockwise+grpo-s1",
                     "fp8_blockwise+drpo-s0"]  # fmt: skip


def test_a_constraint_may_write_the_value_itself(tmp_path):
    axes = {"rollout.max_staleness": [0, 4]}
    found = cells(tmp_path, axes=axes, exclude=[{"rollout.max_staleness": 0}])
    assert [cell.id for cell in found] == ["max_staleness=4-s0"]


def test_the_user_s_own_code_is_relative_to_the_file_that_names_it(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "b.yaml").write_text(yaml.safe_dump({**BASE, "task": {"reward": "r.py:f"}}))
    (cell,) = cells(tmp_path, base="base/b.yaml", settings={"objective.name": "o.py:Mine"})
    assert cell.tree["task"]["reward"] == f"{tmp_path}/base/r.py:f"
    assert cell.tree["objective"]["name"] == f"{tmp_path}/o.py:Mine"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"axis": {}}, r"mine.yaml:\d+: unknown key 'axis'; did you mean 'axes'"),
        ({"budget": {"step": 1}}, r"mine.yaml:\d+: unknown key 'budget.step'; did you mean 'budget.steps'"),
        ({"budget": {"steps": 0}}, r"mine.yaml:\d+: 'budget.steps' is 0"),
        ({"budget": {"steps": 1, "tokens": float("inf")}}, "budget.tokens"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"seeds": []}, "'seeds' is"),
        ({"size": "small", "axes": AXES}, "there is no axis 'small'"),
        ({"base": "nowhere.yaml"}, r"mine.yaml:1: base: no configuration file"),
        ({"name": "a/b"}, "it names one folder"),
        ({"axes": {"optimizer.lr": []}}, "axes.optimizer.lr: it has no values"),
        ({"axes": {"optimizer.lr": [1, 1]}}, "axes.optimizer.lr: a value is given twice"),
        ({"axes": {"model.path": ["a/b"]}}, "axes.model.path: 'a/b' cannot name a value"),
        ({"axes": {"objective": [{"name": "drpo"}]}}, "needs a name"),
        ({"axes": {"seed": [1]}}, "'seed' cannot be the name of an axis"),
        ({"axes": {"a": {"x": {"run.seed": 3}}}}, r"axes.a.x: the study itself sets run.seed"),
        ({"axes": {"a": {"x": {"run": {"keep": 3}}}}}, r"axes.a.x: the study itself sets run.seed"),
        ({"settings": {"lr": 3}}, r"settings: 'lr' must read section.key"),
        ({"settings": {"model.path.deep": 3}}, r"settings: model.path.deep: 'path' is not a section"),
        ({"exclude": [{"precision.rolout": "bf16"}], "axes": AXES}, r"exclude\[0\]: there is no axis 'precision"),
        ({"only": [{"arm": "grp"}], "axes": AXES}, r"only\[0\]: arm has no value grp; did you mean 'grpo'"),
        ({"only": [{"seed": 3}]}, r"only\[0\]: seed has no value 3"),
        ({"only": [{}]}, r"only\[0\]: it names no axis"),
        ({"exclude": [{"seed": 0}]}, "they leave no cell"),
        ({"axes": {"arm": {"a": {}, "a-b": {}}, "n": {"b-c": {}, "c": {}}}, "size": "n"}, "would be named a-b-c-s0"),
        ({"axes": {f"alp.a{n}": list(range(100)) for n in range(3)}}, "they make 1000000 cells"),
        ({"verdict": {"margin": -1}}, "verdict.margin"),
    ],
)  # fmt: skip
def test_a_malformed_study_is_refused_with_its_place(tmp_path, keys, words):
    with pytest.raises(ConfigError, match=words):
        cells(tmp_path, **keys)


def test_a_file_that_is_no_study_is_refused(tmp_path):
    for text, words in (("", "top level must be a mapping"), ("- 1", "top level"), ("a: &a [*a]", "alias|nested")):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_study(tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match="no study file"):
        load_study(tmp_path / "none.yaml")

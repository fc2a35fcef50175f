"""A study whose configuration changed is not mixed with its old results."""

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import yaml

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.study.study_folder import StudyFolder, make_record
from tests.unit.study import studies
from tests.unit.study.studies import AXES, resolved, written


def begin(folder: StudyFolder, cell: str = "grpo-s0") -> None:
    """Let a cell have a result."""
    folder.run(cell).mkdir()
    (folder.run(cell) / "log.jsonl").write_text("")


def test_the_folder_holds_the_configuration_of_every_cell(tmp_path):
    folder = written(tmp_path)
    assert sorted(path.stem for path in folder.plans.iterdir()) == ["drpo-s0", "drpo-s1", "grpo-s0", "grpo-s1"]
    plan = yaml.safe_load(folder.plan("drpo-s1").read_text())
    assert plan["run"] == {"seed": 1, "steps": 3, "dir": str(tmp_path / "out"), "name": "runs/drpo-s1"}
    assert folder.record()["arms"] == ["grpo", "drpo"]


def test_without_results_a_study_may_change_and_its_old_cells_go(tmp_path):
    written(tmp_path)
    folder = written(tmp_path, axes={}, settings={"optimizer.lr": 0.5})
    assert (
        sorted(path.stem for path in folder.plans.iterdir()) == list(folder.record()["cells"]) == ["all-s0", "all-s1"]
    )


def test_the_same_study_goes_on(tmp_path):
    begin(written(tmp_path))
    assert len(written(tmp_path).record()["history"]) == 1


def test_a_study_of_an_earlier_release_goes_on(tmp_path):
    folder = written(tmp_path)
    begin(folder)
    study, cells = resolved(tmp_path)
    old = make_record(study, [replace(one, digest=one.former_digest) for one in cells])
    old["history"] = [{"digest": old["digest"], "verdict": old["verdict"]}]
    (folder.folder / "study.json").write_text(json.dumps(old))
    with pytest.raises(ConfigError, match="4 of its cells now have another configuration"):
        written(tmp_path, settings={"optimizer.lr": 0.5})
    record = written(tmp_path).record()
    assert record["cells"]["grpo-s0"]["digest"] == cells[0].digest != cells[0].former_digest
    assert len(record["history"]) == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"settings": {"optimizer.lr": 0.5}}, r"4 of its cells now have another configuration.*grpo-s0, grpo-s1"),
        ({"seeds": [0]}, r"2 of its cells are no longer in the study \(grpo-s1, drpo-s1\)"),
        ({"budget": {"steps": 4}}, "another configuration"),
        ({"budget": {"steps": 3, "tokens": 10}}, "budget of the study has changed"),
        ({"paired": False}, "paired of the study has changed"),
    ],
)
def test_with_results_another_study_is_refused_even_if_it_extends(tmp_path, keys, words):
    folder = written(tmp_path)
    begin(folder)
    before = (folder.folder / "study.json").read_bytes()
    for extend in (False, True):
        with pytest.raises(ConfigError, match=words):
            written(tmp_path, extend=extend, **keys)
    assert (folder.folder / "study.json").read_bytes() == before


def test_another_warm_start_in_the_same_place_is_another_study(tmp_path):
    begin(written(tmp_path))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(ConfigError, match="another configuration, model or data"):
        written(tmp_path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"seeds": [0, 1, 2]}, r"2 new cells \(grpo-s2, drpo-s2\): pass --extend"),
        ({"verdict": {"reference": "grpo"}}, "another verdict: pass --extend"),
    ],
)
def test_an_extension_is_asked_for_and_recorded(tmp_path, keys, words):
    begin(written(tmp_path))
    with pytest.raises(ConfigError, match=words):
        written(tmp_path, **keys)
    folder = written(tmp_path, extend=True, **keys)
    history = folder.record()["history"]
    assert [entry["cells"] for entry in history] == [4, len(folder.record()["cells"])]
    assert history[0]["digest"] != history[1]["digest"]


def test_one_command_runs_a_study_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_rl.study.study_folder.LOCK_WAIT_S", 0.0)
    folder = written(tmp_path)
    with ExitStack() as first:
        assert not folder.is_locked()
        folder.lock(first)
        assert StudyFolder(folder.folder).is_locked()
        with ExitStack() as second, pytest.raises(ConfigError, match="in use by another `study run`"):
            StudyFolder(folder.folder).lock(second)
    assert not folder.is_locked()


def test_a_folder_without_a_study_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        StudyFolder(tmp_path).record()
    (tmp_path / "study.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        StudyFolder(tmp_path).record()


def test_a_torn_line_of_an_attempt_is_skipped_and_the_next_one_is_not(tmp_path):
    folder = written(tmp_path)
    folder.add_attempt(cell="grpo-s0", code=0)
    with (folder.folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"cell": "grpo-s1", "code": 0})[:9])
    assert [attempt["cell"] for attempt in folder.attempts()] == ["grpo-s0"]
    folder.add_attempt(cell="drpo-s0", code=0)
    assert [attempt["cell"] for attempt in folder.attempts()] == ["grpo-s0", "drpo-s0"]


def test_a_study_goes_on_from_the_copy_of_its_file(tmp_path):
    folder = written(tmp_path)
    study, cells = resolved(tmp_path)
    copy = folder.folder / "study.yaml"
    before = copy.read_bytes()
    folder.write(make_record(study, cells), cells, copy, extend=False)
    assert copy.read_bytes() == before


def test_the_file_of_the_study_may_be_found_by_its_name(tmp_path):
    assert studies.load_study(studies.write_study(tmp_path, axes=AXES))[0].folder == tmp_path / "out"

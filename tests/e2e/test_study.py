"""A study of two by two cells: killed and started again it has the results of one that nobody disturbed."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from megatron_rl.cli import main
from megatron_rl.errors import ConfigError
from megatron_rl.study.run_study import StudyRequest, run_study
from megatron_rl.trainer.run_control import RunControl
from tests.e2e.command import assert_refused, records
from tests.e2e.conftest import SMALL_RUN

AXES = {
    "objective": {"drpo": {}, "grpo": {"objective": {"name": "grpo", "advantage": "grpo"}}},
    "optimizer.lr": [3.0e-3, 1.0e-3],
}
CELLS = [f"{objective}+lr={lr}-s3" for objective in ("drpo", "grpo") for lr in (0.003, 0.001)]


@pytest.fixture
def write(arithmetic_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a study of the small run."""

    def write(name: str, **keys: object) -> Path:
        base = yaml.safe_load(SMALL_RUN.format(model=arithmetic_model))
        base["rollout"]["deterministic"] = True
        base["run"] |= {"loggers": []}
        base["eval"] = {"prompts": 2, "every": 1}
        study = {"base": base, "axes": AXES, "seeds": [3], "budget": {"steps": 2}, **keys}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
        return path

    return write


def timeless(folder: Path, table: str) -> list[dict]:
    """Return the rows of a table without the columns that depend on the time of day."""
    found = pq.read_table(folder / "results" / f"{table}.parquet").to_pylist()
    return [{key: value for key, value in row.items() if "seconds" not in key and "per_s" not in key} for row in found]


def test_a_study_that_is_killed_and_started_again_has_the_same_results(start, cli, write, tmp_path):
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    result = cli("study", "run", write("whole"), "--workers", "2")
    assert result.code == 0, result.all
    assert "4 cells: 4 arms, 1 seeds; 4 done" in result.out
    file = write("broken")
    command = start("study", "run", file, "--workers", "2")
    command.until(lambda: records(broken / "runs" / CELLS[0]))
    command.process.kill()
    command.until_gone(command.members, patience=30)
    result = cli("study", "run", file, "--workers", "2")
    assert result.code == 0, result.all
    for table in ("evals", "steps"):
        assert timeless(broken, table) == timeless(whole, table)
    assert len(timeless(whole, "evals")) == 4 * 3 * 2 and len(timeless(whole, "steps")) == 4 * 2
    assert [row["loss"] for row in timeless(whole, "steps")][:2] != [row["loss"] for row in timeless(whole, "steps")][
        2:4
    ]
    cells = json.loads((broken / "results" / "cells.json").read_text())
    assert list(cells) == CELLS and {cell["status"] for cell in cells.values()} == {"done"}
    assert max(len(cell["starts"]) for cell in cells.values()) == 2, "a cell that was killed has gone on"
    assert cells[CELLS[0]]["provenance"]["layout"]["ranks"] == 1
    result = cli("study", "run", file)
    assert result.code == 0 and "0 to run" in result.out, result.all
    write("broken", settings={"optimizer.weight_decay": 0.5})
    result = cli("study", "run", file)
    assert_refused(result, "ConfigError", "4 of its cells now have another configuration", CELLS[0])


def test_a_grid_with_cells_that_cannot_run_is_refused_whole(refused, write, tmp_path):
    precision = {"plain": {}, "low": {"precision.recipe": "delayed", "precision.first_last_bf16": True}}
    file = write("bad", axes={"precision": precision, "parallel.pipeline": [1, 3]}, seeds=[0, 1])
    result = refused("study", "run", file)
    assert_refused(result, "ConfigError", "6 of 8 cells cannot run, so none is started", "low+pipeline=1-s1", "3-s0")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def here(monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """A function that runs a command, which starts no process, inside this process and returns what it prints."""

    def here(*arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["megatron-rl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return here


def test_a_dry_run_prints_the_cells_and_writes_nothing(write, here, tmp_path):
    out = here("study", "run", write("dry"), "--dry-run")
    assert out.splitlines()[-1] == "4 cells: 4 arms, 1 seeds"
    assert all(cell in out for cell in CELLS)
    assert not (tmp_path / "runs").exists()
    results = tmp_path / "runs" / "dry" / "results"
    results.mkdir(parents=True)
    other = {"cells": {"another": {}}, "budget": {}, "paired": True, "size_axis": None, "history": [], "digest": ""}
    (results.parent / "study.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="1 of its cells are no longer in the study"):
        run_study(StudyRequest(write("dry"), dry_run=True))


def test_an_array_has_a_task_for_each_cell_that_is_not_done(write, here, tmp_path):
    (tmp_path / "profile.yaml").write_text("{gpus_per_node: 0, cpus_per_task: 1}")
    command = ["study", "run", write("many"), "--slurm", "--profile", "profile.yaml", "--dry-run"]
    assert "#SBATCH --array=0-3" in here(*command)
    study = tmp_path / "runs" / "many"
    RunControl(study / "runs" / CELLS[1]).write_done(2)
    assert "#SBATCH --array=0-2" in here(*command)
    left = sorted(cell for cell in CELLS if cell != CELLS[1])
    assert sorted(path.stem for path in (study / "array").glob("*.yaml")) == left
    tasks = json.loads((study / "runs" / "launch" / "job.json").read_text())["tasks"]
    assert [Path(task).parent.parent.name for task in tasks] == left
    config = yaml.safe_load((study / "runs" / CELLS[2] / "launch" / "config.yaml").read_text())
    assert config["objective"]["name"] == "grpo" and "delta" not in config["objective"]
    assert config["optimizer"]["lr"] == 3.0e-3 and config["run"]["dir"] == str(study)

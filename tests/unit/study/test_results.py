"""The tables of a study hold what its runs logged, up to the budget, and stay when a run folder is gone."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from megatron_rl.diagnostics.evaluations import Evaluation, EvaluationLog
from megatron_rl.diagnostics.runlog import RunLog
from megatron_rl.errors import UserError
from megatron_rl.study.cell_status import read_states
from megatron_rl.study.results import collect_results
from megatron_rl.study.study_folder import StudyFolder
from megatron_rl.trainer.run_control import RunControl
from tests.unit.study.studies import written


def make_run(folder: StudyFolder, cell: str, steps: int, *, done: bool = True, reward: float = 0.5) -> None:
    """Write what a run of so many steps leaves behind: 10 tokens and 2 seconds a step."""
    run = folder.run(cell)
    with RunLog(run) as log:
        for step in range(steps):
            log.append({"kind": "step", "step": step, "tokens/total": 10, "seconds/total": 2.0, "reward/mean": reward})
    for step in range(steps + 1):
        EvaluationLog(run).append(Evaluation(step, ["p", "q"], [1.0, 0.0], [[1.0, 0.0, 0.0, 0.0], [1.0] * 4]))
    (run / "provenance.jsonl").write_text(json.dumps({"revision": "abc", "gpus": 4, "parameters": 7}) + "\n")
    if done:
        RunControl(run).write_done(steps)


def rows(folder: StudyFolder, table: str) -> list[dict]:
    return pq.read_table(folder.results / f"{table}.parquet").to_pylist()


def test_rows_have_the_rewards_of_every_prompt_and_the_numbers_of_every_step(tmp_path):
    folder = written(tmp_path, axes={"arm": {"grpo": {"objective.name": "grpo"}}}, seeds=[5])
    make_run(folder, "grpo-s5", 3)
    collect_results(folder)
    evals, steps = rows(folder, "evals"), rows(folder, "steps")
    assert len(evals) == 4 * 2 and len(steps) == 3
    assert evals[0] == {
        "cell": "grpo-s5", "arm": "grpo", "axis.arm": "grpo", "size": 0, "seed": 5, "step": 0, "prompt": 0,
        "prompt_id": "p", "samples": 4, "reward": 0.25, "variance": 0.25,
    }  # fmt: skip
    assert [row["reward"] for row in evals[:2]] == [0.25, 1.0]
    assert steps[1]["step"] == 1 and steps[1]["tokens"] == 10.0 and steps[1]["seconds"] == 2.0
    assert steps[1]["gpu_seconds"] == 8.0 and steps[1]["reward"] == 0.5 and steps[1]["mismatch_k3"] is None
    about = json.loads((folder.results / "cells.json").read_text())["grpo-s5"]
    assert about["status"] == "done" and about["provenance"]["revision"] == "abc"


def test_the_greedy_metric_is_one_response(tmp_path):
    folder = written(tmp_path, axes={}, seeds=[0], verdict={"metric": "greedy"})
    make_run(folder, "all-s0", 3)
    collect_results(folder)
    assert [(row["reward"], row["samples"]) for row in rows(folder, "evals")[:2]] == [(1.0, 1), (0.0, 1)]


def test_the_size_is_the_number_of_parameters(tmp_path):
    axes = {"size": {"small": {"optimizer.lr": 1.0e-3}}}
    folder = written(tmp_path, axes=axes, size="size", seeds=[0])
    make_run(folder, "all-small-s0", 3)
    collect_results(folder)
    assert {row["size"] for row in rows(folder, "evals")} == {7}


@pytest.mark.parametrize("budget", [{"tokens": 25}, {"seconds": 4.0}])
def test_a_cell_counts_up_to_its_budget_and_is_done_there(tmp_path, budget):
    folder = written(tmp_path, axes={}, seeds=[0], budget={"steps": 100, **budget})
    make_run(folder, "all-s0", 5, done=False)
    (state,) = collect_results(folder)
    assert state.status == "done"
    assert {row["step"] for row in rows(folder, "steps")} == {0, 1}
    assert {row["step"] for row in rows(folder, "evals")} == {0, 1, 2}


def test_states_tell_what_can_go_on_from_what_has_failed_and_what_has_not_begun(tmp_path):
    folder = written(tmp_path, seeds=[0, 1, 2])
    make_run(folder, "grpo-s0", 3)
    make_run(folder, "grpo-s1", 1, done=False)  # killed
    make_run(folder, "grpo-s2", 1, done=False)
    folder.add_attempt(cell="grpo-s2", code=2)
    folder.output("grpo-s2").write_text("some\nUserError: reward is nan\n\n")
    folder.add_attempt(cell="drpo-s0", code=130)
    folder.add_attempt(cell="drpo-s1", code=137)
    states = {state.cell: state for state in collect_results(folder)}
    assert [state.status for state in states.values()] == [
        "done", "stopped", "failed", "stopped", "stopped", "missing"
    ]  # fmt: skip
    assert (states["grpo-s2"].exit_code, states["grpo-s2"].error) == (2, "UserError: reward is nan")
    assert {row["cell"] for row in rows(folder, "evals")} == {"grpo-s0", "grpo-s1", "grpo-s2"}


def test_a_task_of_slurm_that_ended_badly_has_failed(tmp_path):
    folder = written(tmp_path, axes={}, seeds=[0, 1])
    for cell, code in (("all-s0", 2), ("all-s1", 75)):
        for name in ("launch", "control"):
            (folder.run(cell) / name).mkdir(parents=True)
        (folder.run(cell) / "control" / "result.json").write_text(json.dumps({"code": code}))
    assert [state.status for state in collect_results(folder)] == ["failed", "missing"]


def test_results_of_a_cell_that_is_done_are_written_once(tmp_path):
    folder = written(tmp_path, axes={}, seeds=[0, 1])
    make_run(folder, "all-s0", 3)
    make_run(folder, "all-s1", 2, done=False)
    collect_results(folder)
    first = rows(folder, "evals")
    shutil.rmtree(folder.runs)
    folder.runs.mkdir()
    assert [state.status for state in read_states(folder, folder.record())] == ["done", "missing"]
    make_run(folder, "all-s0", 3, reward=0.9)
    make_run(folder, "all-s1", 3)
    states = collect_results(folder)
    assert [state.status for state in states] == ["done", "done"]
    assert [row["reward"] for row in rows(folder, "steps") if row["cell"] == "all-s0"] == [0.5] * 3
    assert [row for row in rows(folder, "evals") if row["cell"] == "all-s0"] == [
        row for row in first if row["cell"] == "all-s0"
    ]


def test_damaged_results_of_a_cell_are_named_with_the_mend(tmp_path):
    folder = written(tmp_path, axes={}, seeds=[0])
    make_run(folder, "all-s0", 3)
    collect_results(folder)
    folder.part("all-s0").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"all-s0.json cannot be read .*remove it"):
        read_states(folder, folder.record())


@pytest.mark.parametrize("damage", [b"", bytes(100), None], ids=["empty", "zeros", "cut"])
@pytest.mark.parametrize("table", ["evals", "steps"])
def test_damaged_tables_of_a_cell_are_named_and_made_again(tmp_path, table, damage):
    folder = written(tmp_path, axes={}, seeds=[0])
    make_run(folder, "all-s0", 3)
    collect_results(folder)
    before = rows(folder, table)
    part = folder.results / "parts" / f"all-s0.{table}.parquet"
    part.write_bytes(part.read_bytes()[:200] if damage is None else damage)
    with pytest.raises(UserError, match=rf"all-s0.{table}.parquet cannot be read .*remove .*all-s0.json"):
        collect_results(folder)
    folder.part("all-s0").unlink()
    collect_results(folder)
    assert rows(folder, table) == before


def test_a_study_without_any_result_has_empty_tables_with_their_columns(tmp_path):
    folder = written(tmp_path)
    collect_results(folder)
    table = pq.read_table(folder.results / "evals.parquet")
    assert table.num_rows == 0 and {"arm", "axis.arm", "seed", "step", "prompt", "reward"} <= set(table.column_names)

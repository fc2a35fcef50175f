"""Rounds of teacher and student write their records, and a round resumes wherever it was interrupted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_rl.policy.checkpoint_state import newest_valid
from megatron_rl.ports import free_port
from megatron_rl.report import write_report
from tests.e2e.command import Command, assert_declared, assert_refused, records
from tests.e2e.conftest import version_of
from tests.e2e.test_resume import untimed

TEACHER, STUDENT = 12, 10  # updates
ERPD_RUN = f"""\
parallel: {{{{tensor: 2}}}}
model: {{{{path: {{model}}}}}}
rollout:
  prompts_per_step: 8
  samples_per_prompt: 8
  max_prompt_tokens: 4
  max_new_tokens: 2
  deterministic: true
  record_logmu: true
objective:
  name: erpd
  teacher: {{{{name: erpd_mse}}}}
  teacher_updates: {TEACHER}
  keep: [2, 5]
  save_every: 4
  signals:
    - {{{{teacher: last, denominator: unlearned@2, updates: {STUDENT - 4}}}}}
    - {{{{teacher: 5, denominator: student@0, updates: 2}}}}
    - {{{{denominator: moving, updates: 2}}}}
  outliers: negative_on_positives
optimizer: {{{{lr: 2.0e-3, updates_per_step: 2, tokens_per_microbatch: 256, warmup_updates: 3}}}}
task: {{{{name: arithmetic, max_operand: 2, held_out: 2}}}}
eval: {{{{every: 2, prompts: 2, samples: 2}}}}
run: {{{{name: rounds, steps: 2, save_every: 0, keep: 1, seed: 3}}}}
"""


def configuration(folder: Path, model: Path) -> Path:
    """Write the configuration file of a run of two rounds and return its path."""
    path = folder / "erpd.yaml"
    path.write_text(ERPD_RUN.format(model=model), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def straight(arithmetic_model, tmp_path_factory) -> Path:
    """The run folder of two rounds without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    configuration(folder, arithmetic_model)
    command = Command(["train", "erpd.yaml"], folder, {})
    try:
        result = command.wait()
    finally:
        command.end()
    assert result.code == 0, result.all
    return folder / "runs" / "rounds"


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of an .npz file."""
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


def test_a_round_logs_both_stages_and_what_the_student_took_over(straight):
    assert_declared(straight)
    assert [(r["step"], r["version"]) for r in records(straight)] == [(0, 1), (1, 2)]
    for step, record in enumerate(records(straight, "erpd")):
        folder = straight / "erpd" / f"step_{step:06d}"
        batch, columns = arrays(folder / "batch.npz"), arrays(folder / "columns.npz")
        assert columns.keys() == {"old", "teacher@12", "teacher@5", "teacher@2", "student@0"}
        trained = int(batch["mask"].sum())
        assert 0 < trained < len(batch["mask"]) and len(columns["old"]) == len(batch["mask"])
        assert record["step"] == step
        assert record["erpd/teacher/kl"] > 1e-3 and record["erpd/student/kl"] > 1e-4
        assert [len(record[f"erpd/{s}/loss"]) for s in ("teacher", "student")] == [TEACHER, STUDENT]
        assert sum(record["erpd/shift/count"]) == trained
        assert len(record["erpd/shift/mean"]) == len(record["erpd/shift/edges"]) == len(record["erpd/shift/count"])
        assert 0 <= record["erpd/student/clipped"] < 1
        first, last = (np.mean(record["erpd/teacher/loss"][at : at + 2]) for at in (0, TEACHER - 2))  # whole epochs
        assert last < first, "a mean squared error that is minimized falls"
    first, second = records(straight, "erpd")
    assert "erpd/teacher/greedy" not in first and 0 <= second["erpd/teacher/greedy"] <= 1
    assert second["erpd/teacher/explained_variance"] is not None
    for step in records(straight):
        assert step["mismatch/ratio/min"] == pytest.approx(1, abs=1e-3) == step["mismatch/ratio/max"]
        assert step["kl/k3"] > 1e-4 > step["mismatch/kl/k3"], "the student has left the policy that sampled"
    # pi_old of the first round is the policy after 0 steps
    columns = arrays(straight / "erpd" / "step_000000" / "columns.npz")
    assert np.array_equal(columns["student@0"], columns["old"])
    # the evaluated teacher has its own weight version
    assert [(r["step"], r["version"]) for r in records(straight, "eval")] == [(0, 1), (2, 4)]


def test_only_the_last_round_and_the_older_student_keep_their_checkpoints(straight):
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["step_000000", "step_000002"]
    assert not (straight / "erpd" / "step_000000" / "teacher").exists()
    last = straight / "erpd" / "step_000001"
    assert {"step_000002", "step_000005", "step_000012"} <= {p.name for p in (last / "teacher").iterdir()}
    assert newest_valid(last / "student")[0] == last / "student" / f"step_{STUDENT:06d}"


def test_the_report_draws_the_rounds(straight):
    page = write_report(straight)
    for name in ("erpd_kl", "erpd_shift", "erpd_stages"):
        assert f'src="{name}.png"' in page.read_text() and (page.parent / f"{name}.png").is_file()


def done(folder: Path, step: int, stage: str) -> int:
    """Return the number of finished updates of a stage ("teacher" or "student") of a step."""
    path = folder / "erpd" / f"step_{step:06d}" / f"{stage}.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_a_round_stopped_and_killed_inside_either_stage_ends_bit_for_bit_like_an_undisturbed_one(
    start, arithmetic_model, tmp_path, straight
):
    path, folder = configuration(tmp_path, arithmetic_model), tmp_path / "runs" / "rounds"
    command = start("train", path)
    command.until(lambda: done(folder, 0, "teacher") >= 6)
    command.interrupt()
    result = command.wait()
    assert result.code == 130 and "stopped after 0 steps; go on with --resume" in result.err, result.all
    assert done(folder, 0, "teacher") < TEACHER
    for step, stage, updates, least in ((0, "student", STUDENT, 6), (1, "teacher", TEACHER, 6)):
        command = start("train", "--resume", path)
        command.until(lambda step=step, stage=stage, least=least: done(folder, step, stage) >= least)
        command.end()
        assert least <= done(folder, step, stage) < updates, "the kill was to come inside the stage"
        assert not (folder / "checkpoints" / f"step_{step + 1:06d}").exists()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("erpd/*/batch.npz")}
    result = start("train", "--resume", path).wait()
    assert result.code == 0, result.all
    assert {p: p.stat().st_mtime_ns for p in folder.glob("erpd/*/batch.npz")} == before and len(before) == 2
    for kind in ("step", "erpd", "eval"):
        assert [untimed(r) for r in records(folder, kind)] == [untimed(r) for r in records(straight, kind)]
    ours, theirs = (load_file(run / "hf" / "model.safetensors") for run in (folder, straight))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_servers_of_somebody_else_that_rest_when_a_run_stops_are_named_and_woken_by_resuming(
    start, arithmetic_model, tmp_path
):
    path, folder = configuration(tmp_path, arithmetic_model), tmp_path / "runs" / "rounds"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = start("serve", "--model", arithmetic_model, "--port", port, "--threads", "1", "--deterministic")
    server.until(lambda: version_of(url))
    settings = ("run.steps=1", "eval.prompts=0", "parallel.tensor=1", f"rollout.urls=[{url}]")
    command = start("train", path, *settings)
    command.until(lambda: done(folder, 0, "teacher") >= 2)
    command.interrupt()
    result = command.wait()
    assert result.code == 130, result.all
    said = f"left without their memory: {url}; --resume of this run lets them allocate it again"
    assert said in result.err, result.all
    other = start("train", "--resume", path, *settings, "rollout.temperature=0.5", "optimizer.weight_decay=0.5").wait()
    assert other.code == 2 and "begun with other settings (optimizer.weight_decay, rollout.temperature)" in other.err, (
        other.all
    )
    assert "without their memory" not in other.err, "it was woken and given weights before the round was looked at"
    result = start("train", "--resume", path, *settings).wait()
    assert result.code == 0, result.all
    assert not (folder / "engines_released.json").exists() and version_of(url) == "2"


def test_a_policy_that_is_not_the_one_the_round_began_with_is_refused(cli, arithmetic_model, tmp_path, straight):
    path, folder = configuration(tmp_path, arithmetic_model), tmp_path / "runs" / "rounds"
    shutil.copytree(straight, folder)
    (folder / "checkpoints" / "step_000002").rename(folder / "later")
    note = folder / "erpd" / "step_000000" / "round.json"
    content = json.loads(note.read_text())
    rank = next(name for name in content["digest"] if name.startswith("rank 1 "))
    content["digest"][rank] = "0" * 64
    note.write_text(json.dumps(content))
    result = cli("train", "--resume", path)
    assert result.code == 2, result.all
    assert "CheckpointError" in result.err and rank in result.err and "000000000000" in result.err, result.all
    assert str(note.parent.relative_to(tmp_path)) in result.err


def test_a_plan_that_cannot_be_carried_out_is_refused_before_anything_starts(refused, arithmetic_model, tmp_path):
    result = refused("train", configuration(tmp_path, arithmetic_model), "objective.signals=[{denominator: student@7}]")
    assert_refused(result, "ConfigError", "student@7", "run.steps=7", "--resume")
    assert not (tmp_path / "runs").exists()

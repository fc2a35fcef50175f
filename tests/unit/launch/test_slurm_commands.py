"""A Slurm that does not respond is distinguished from a forgotten job. Scripts stand for Slurm's commands."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.launch.conductor import run_job, slurm_commands
from megatron_rl.launch.conductor.control_files import write_json
from megatron_rl.launch.conductor.run_attempt import JobHosts
from megatron_rl.launch.conductor.run_files import RunFiles
from megatron_rl.launch.conductor.run_job import _beating, _other_job
from megatron_rl.launch.conductor.slurm_commands import job_state, requeue_job, state_at_end
from megatron_rl.launch.conductor.slurm_states import FORGOTTEN, SILENT
from megatron_rl.launch.job_of_folder import job_of
from megatron_rl.launch.status import cancel_run, find_run, read_status, status_lines
from megatron_rl.launch.submit import check_no_job, wait_for_jobs

Slurm = Callable[..., None]
SILENCE = {"squeue": "exit 1", "sinfo": "exit 1", "scontrol": "exit 1", "scancel": "exit 1"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A function that installs scripts as Slurm's commands. Pauses between tries take no time."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(slurm_commands.time, "sleep", lambda _: None)

    def install(**commands: str) -> None:
        for name, script in commands.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return install


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run whose job is 77."""
    for name in ("launch", "control"):
        (tmp_path / "run" / name).mkdir(parents=True)
    write_json(str(tmp_path / "run" / "launch" / "submit.json"), {"jobs": ["77"]})
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("squeue", "sinfo", "state"),
    [
        ("echo RUNNING", "exit 1", "RUNNING"),
        ("true", "exit 1", FORGOTTEN),  # an ended job is not in the queue
        ("echo Invalid job id specified; exit 1", "echo batch", FORGOTTEN),
        ("exit 1", "exit 1", SILENT),
    ],
)
def test_the_state_of_a_job(slurm: Slurm, squeue: str, sinfo: str, state: str) -> None:
    slurm(squeue=squeue, sinfo=sinfo)
    assert job_state("77") == state


def test_the_end_of_an_attempt_waits_for_a_slurm_that_comes_back(slurm: Slurm, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    slurm(squeue=f"echo >>{asked}; [ $(wc -l <{asked}) -gt 12 ] && echo RUNNING", sinfo="exit 1")
    assert state_at_end("77", lambda: False) == "RUNNING"
    assert len(asked.read_text()) == 13


def test_the_wait_for_slurm_has_an_end(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(**SILENCE)
    assert state_at_end("77", lambda: True) == SILENT  # the job's time is over
    monkeypatch.setattr(slurm_commands, "_PATIENCE_S", 0.0)
    assert state_at_end("77", lambda: False) == SILENT


class Signs:
    """A runner that counts its signs of life. The first cannot be written."""

    count = 0

    def beat(self) -> None:
        self.count += 1
        if self.count == 1:
            raise OSError("no space left on device")


def test_a_conductor_that_waits_between_attempts_goes_on_giving_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_job, "BEAT_S", 0.001)
    runner, limit = Signs(), time.monotonic() + 30
    with _beating(runner):  # type: ignore[arg-type]
        while runner.count < 3 and time.monotonic() < limit:
            Event().wait(0.001)
    assert runner.count >= 3
    count = runner.count
    Event().wait(0.05)
    assert runner.count == count


def test_a_forgotten_job_frees_its_folder_and_a_silent_slurm_does_not(slurm: Slurm, run: Path) -> None:
    slurm(squeue="true")
    check_no_job(run)
    slurm(**SILENCE)
    with pytest.raises(ConfigError, match=r"Slurm does not say whether job 77 still works in .*: try again when"):
        check_no_job(run)


def test_every_job_of_a_submission_counts_and_a_task_knows_its_array(slurm: Slurm, run: Path) -> None:
    write_json(str(run / "launch" / "submit.json"), {"jobs": ["77", "78"]})
    slurm(squeue='case "$*" in *77*) echo PENDING;; esac')
    assert job_of(run) == ("77", "PENDING")
    task = run / "task"
    (task / "launch").mkdir(parents=True)
    write_json(str(task / "launch" / "job.json"), {"submit": str(run / "launch" / "submit.json")})
    with pytest.raises(ConfigError, match=r"job 77 is PENDING and works in .*task"):
        check_no_job(task)


def test_waiting_goes_on_while_slurm_is_silent(slurm: Slurm, run: Path) -> None:
    result = json.dumps({"code": 0, "why": "the run is done"})
    slurm(squeue="exit 1", sinfo=f"echo '{result}' > {run}/control/result.json; exit 1")
    assert wait_for_jobs([run], run / "launch", ask_s=-1) == 0


def test_waiting_ends_with_a_job_that_slurm_has_forgotten(slurm: Slurm, run: Path) -> None:
    slurm(squeue="true")
    assert wait_for_jobs([run], run / "launch", ask_s=-1) == 130


def test_a_job_that_is_over_is_not_submitted_again_after_a_failed_requeue(slurm: Slurm) -> None:
    slurm(scontrol="exit 1", squeue="true")
    assert requeue_job("77").code == 0
    slurm(**SILENCE)
    assert requeue_job("77").code == 1


def test_commands_say_that_slurm_is_silent(slurm: Slurm, run: Path) -> None:
    slurm(**SILENCE)
    assert next(status_lines(read_status(run))) == f"{run}: Slurm does not respond"
    with pytest.raises(UserError, match="Slurm does not respond: name the run folder"):
        find_run("77")
    with pytest.raises(UserError, match=r"jobs 77 were not ended; nothing is tried again .* scancel 77"):
        cancel_run(run, save=False, patience_s=0)
    assert (run / "control" / "cancel").exists()
    slurm(squeue="true")
    assert next(status_lines(read_status(run))) == f"{run}: unknown to Slurm"
    with pytest.raises(UserError, match="Slurm does not know job 77 any more"):
        find_run("77")


def test_a_job_started_by_hand_leaves_the_folder_to_the_one_that_works_there(slurm: Slurm, run: Path) -> None:
    files = RunFiles(str(run), "")
    beat = {"time": slurm_commands.time.time(), "phase": "training", "job": "77"}
    write_json(files.control("conductor"), beat)
    slurm(squeue="echo RUNNING")
    assert _other_job(files, JobHosts("77", ())) is None  # its own sign of life, before a requeue
    refused = _other_job(files, JobHosts("78", ()))
    assert refused is not None and (refused.what, refused.code) == ("leave", 2)
    assert refused.why == f"job 77 works in {run}: this one starts nothing"
    slurm(squeue="true")
    assert _other_job(files, JobHosts("78", ())) is None
    slurm(**SILENCE)
    assert _other_job(files, JobHosts("78", ())) is not None
    write_json(files.control("conductor"), dict(beat, time=beat["time"] - 61))
    assert _other_job(files, JobHosts("78", ())) is None

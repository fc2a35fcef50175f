"""A run that a launcher stops saves, says so, leaves in order, and goes on under --resume=auto."""

import json
import os
import signal
import time
from contextlib import suppress

import psutil

from megatron_rl.policy.checkpoint_state import newest_valid
from tests.e2e.command import records

LONG = ("run.steps=500", "run.save_every=2", "parallel.tensor=2", "rollout.deterministic=true")


def put(run, name, content):
    """Write a control file as a launcher does."""
    folder = run / "control"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tmp").write_text(json.dumps(content))
    (folder / f"{name}.tmp").rename(folder / name)


def said(run, name):
    return json.loads((run / "control" / name).read_text())


def signal_twice(process: psutil.Process) -> None:
    """Send a process the signals with which a scheduler asks for a stop."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def test_a_stopped_run_goes_on_in_the_next_attempt_and_one_that_is_done_ends_at_once(start, cli, small_run, run_folder):
    put(run_folder, "attempt", {"token": 1})
    command = start("train", "--resume=auto", small_run, *LONG)
    command.until(lambda: len(records(run_folder)) >= 2)
    ranks = [command.rank(0), command.rank(1)]
    put(run_folder, "stop", {"reason": "deadline", "attempt": 1})
    command.until(lambda: not ranks[1].is_running() or ranks[1].status() == psutil.STATUS_ZOMBIE)
    assert ranks[0].status() != psutil.STATUS_ZOMBIE, "rank 0 leaves last"
    result = command.wait(timeout=60)
    done = len(records(run_folder))
    assert result.code == 130, result.all
    assert "Traceback" not in result.err and "stopping (deadline)" in result.err
    assert said(run_folder, "stopped.json") == {"step": done, "reason": "deadline", "attempt": 1}
    assert newest_valid(run_folder / "checkpoints")[0].name == f"step_{done:06d}"

    put(run_folder, "attempt", {"token": 2})  # the stop of attempt 1 does not stop this one
    whole = [f"run.steps={done + 1}", "rollout.deterministic=true"]  # another layout, other steps
    result = cli("train", "--resume=auto", small_run, *whole)
    assert result.code == 0, result.all
    assert [r["step"] for r in records(run_folder)] == list(range(done + 1))
    assert said(run_folder, "done.json")["step"] == done + 1
    assert not (run_folder / "control" / "stopped.json").exists()

    before = os.stat(run_folder / "log.jsonl").st_mtime_ns
    result = cli("train", "--resume=auto", small_run, *whole)
    assert result.code == 0 and f"is done: {done + 1} steps" in result.out and result.seconds < 20
    assert os.stat(run_folder / "log.jsonl").st_mtime_ns == before
    result = cli("train", "--resume=auto", small_run, *whole, "optimizer.lr=0.5")
    assert result.code == 2 and "another configuration (optimizer.lr:" in result.err


def test_a_signal_to_every_process_of_the_job_stops_the_run_whole(start, small_run, run_folder):
    """A scheduler's signal reaches servers, checkpoint writers and graders, too, while the run needs them."""
    command = start("train", small_run, *LONG, "run.save_every=1", "rollout.servers=2")
    command.until(lambda: len(records(run_folder)) >= 2)
    for process in command.members():
        signal_twice(process)
    while not (run_folder / "control" / "stopped.json").exists() and command.process.poll() is None:
        for process in command.members():  # also those that were started meanwhile, to write checkpoints
            if process.pid != command.process.pid:  # a second signal would tell the launcher to end at once
                signal_twice(process)
        time.sleep(0.1)
    result = command.wait(timeout=60)
    assert result.code == 130, result.all
    assert "Traceback" not in result.err, result.all
    step = said(run_folder, "stopped.json")["step"]
    assert step == len(records(run_folder))
    assert newest_valid(run_folder / "checkpoints")[0].name == f"step_{step:06d}"


def test_a_deadline_ends_the_run_in_time(start, small_run, run_folder):
    command = start("train", small_run, *LONG, "run.deadline_margin_s=2")
    command.until(lambda: len(records(run_folder)) >= 3)
    deadline = time.time() + 8
    put(run_folder, "deadline", {"time": deadline})
    result = command.wait(timeout=60)
    assert result.code == 130, result.all
    assert said(run_folder, "stopped.json")["reason"] == "deadline"
    assert os.stat(run_folder / "control" / "stopped.json").st_mtime < deadline


def test_an_attempt_that_is_over_ends_and_writes_nothing_more(start, small_run, run_folder):
    put(run_folder, "attempt", {"token": 1})
    command = start("train", small_run, *LONG)
    command.until(lambda: newest_valid(run_folder / "checkpoints")[0])
    put(run_folder, "attempt", {"token": 2})
    known = len(records(run_folder))
    result = command.wait(timeout=90)
    assert result.code == 2, result.all
    assert "attempt 2 of the run" in result.err and "this is attempt 1" in result.err
    assert len(records(run_folder)) <= known + 1
    assert not (run_folder / "control" / "stopped.json").exists()

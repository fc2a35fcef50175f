"""A run stops on request of its launcher, in time, and an attempt that is over writes nothing more."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_rl.diagnostics import read_log
from megatron_rl.diagnostics.runlog import RunLog
from megatron_rl.errors import ConfigError
from megatron_rl.trainer.run_control import TOKEN_VARIABLE, RunControl, StopRequest
from megatron_rl.trainer.stops import POLL_S, Stops, percentile95


def put(run: Path, name: str, content: object) -> None:
    """Write a control file as a launcher does."""
    folder = run / "control"
    folder.mkdir(exist_ok=True)
    partial = folder / f"{name}.tmp"
    partial.write_text(content if isinstance(content, str) else json.dumps(content))
    partial.rename(folder / name)


def said(run: Path, name: str) -> dict:
    return json.loads((run / "control" / name).read_text())


def attempt(run: Path, token: int) -> RunControl:
    """Return the control folder as attempt `token` has it, which has just begun."""
    put(run, "attempt", {"token": token})
    return RunControl(run)


def test_a_run_without_a_launcher_has_no_requests(tmp_path):
    control = RunControl(tmp_path)
    control.begin()
    assert (control.attempt, control.stop_request(), control.deadline(), control.done_steps()) == (0, None, None, None)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"reason": "preempted", "attempt": 3}, StopRequest("preempted", 3)),
        ({"reason": "cancel", "attempt": 2}, None),  # of the attempt before
        ({"reason": "user"}, StopRequest("user", None)),
        ("", StopRequest("user", None)),  # `touch control/stop`
        ("[" * 100_000, StopRequest("user", None)),
        ("null", None),
        ({"reason": "cancel", "attempt": "3"}, StopRequest("cancel", None)),
    ],
    ids=["ours", "earlier", "any", "empty", "deep", "null", "text"],
)
def test_a_request_to_stop_is_for_an_attempt(tmp_path, content, found):
    control = attempt(tmp_path, 3)
    put(tmp_path, "stop", content)
    assert control.stop_request() == found


@pytest.mark.parametrize("content", ["", "[]", {"time": None}, {"time": "soon"}, '{"time": NaN}', '{"time": Infinity}'])
def test_a_deadline_that_is_no_time_is_none(tmp_path, content):
    put(tmp_path, "deadline", content)
    assert RunControl(tmp_path).deadline() is None


def test_an_attempt_that_is_over_writes_neither_log_nor_end(tmp_path):
    old = attempt(tmp_path, 1)
    with RunLog(tmp_path, guard=old.check_attempt) as log:
        log.append({"step": 0, "kind": "step"})
        new = attempt(tmp_path, 2)
        for write in (
            lambda: log.append({"step": 1, "kind": "step"}),
            lambda: RunLog(tmp_path, 0, old.check_attempt),
            lambda: old.write_stopped(1, "user"),
            lambda: old.write_done(1),
            old.begin,
        ):
            with pytest.raises(ConfigError, match=r"attempt 2 of the run in .* has begun, and this is attempt 1"):
                write()
    assert [record["step"] for record in read_log(tmp_path)] == [0]
    new.write_done(5)
    assert new.done_steps() == 5 and time.time() - said(tmp_path, "done.json")["time"] < 60


def test_the_token_of_the_environment_tells_an_attempt_that_starts_late_from_the_new_one(tmp_path, monkeypatch):
    put(tmp_path, "attempt", {"token": 2})
    monkeypatch.setenv(TOKEN_VARIABLE, "1")
    with pytest.raises(ConfigError, match=r"attempt 2 .* this is attempt 1"):
        RunControl(tmp_path).begin()
    monkeypatch.setenv(TOKEN_VARIABLE, "one")
    with pytest.raises(ConfigError, match=f"{TOKEN_VARIABLE} is 'one'"):
        RunControl(tmp_path)


def test_a_request_that_was_fulfilled_does_not_stop_the_next_start(tmp_path):
    control = attempt(tmp_path, 1)
    put(tmp_path, "stop", {"reason": "cancel", "attempt": 1})
    control.write_stopped(7, "cancel")
    assert said(tmp_path, "stopped.json") == {"step": 7, "reason": "cancel", "attempt": 1}
    assert control.stop_request() == StopRequest("cancel", 1), "the launcher may want to see it"
    again = RunControl(tmp_path)  # the user's own --resume
    again.begin()
    assert again.stop_request() is None and not (tmp_path / "control" / "stopped.json").exists()
    put(tmp_path, "stop", "")
    again.write_stopped(8, "user")
    assert again.stop_request() is None


@pytest.mark.parametrize(("seconds", "quantile"), [([], 0.0), ([3.0, 1.0], 3.0), ([*range(1, 101)], 96.0)])
def test_the_95th_percentile_of_few_durations_is_the_longest(seconds, quantile):
    assert percentile95(seconds) == quantile


class Watched:
    """A watched control folder, and the signals that it sent to this process."""

    def __init__(self, run: Path, margin_s: float = 1.0) -> None:
        self.signals: list[int] = []
        self.previous = signal.signal(signal.SIGUSR1, lambda number, _: self.signals.append(number))
        self.stops = Stops(attempt(run, 1), margin_s)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.stops.close()
        signal.signal(signal.SIGUSR1, self.previous)

    def wait_for_signal(self) -> bool:
        """Return whether a signal comes within some polls."""
        end = time.monotonic() + 3 * POLL_S + 1
        while time.monotonic() < end and not self.signals:
            time.sleep(0.05)
        return bool(self.signals)


def test_a_request_lets_the_present_step_end(tmp_path):
    with Watched(tmp_path) as watched:
        assert not watched.stops.due_before_step()
        put(tmp_path, "stop", {"reason": "cancel", "attempt": 1})
        assert not watched.wait_for_signal()
        assert watched.stops.due_before_step() and watched.stops.reason == "cancel"


@pytest.mark.parametrize("place", ["start", "preempted", "deadline", "late"])
def test_a_request_that_leaves_no_time_stops_at_once(tmp_path, place):
    """During the start, before a preemption, and if the step, or even its checkpoint, cannot end in time."""
    with Watched(tmp_path) as watched:
        if place != "start":
            watched.stops.due_before_step()
        if place == "deadline":
            watched.stops._step_s.append(100.0)
            put(tmp_path, "deadline", {"time": time.time() + 50})
        if place == "late":
            watched.stops.save_s = [100.0]
            put(tmp_path, "deadline", {"time": time.time() + 50})
        else:
            put(tmp_path, "stop", {"reason": "preempted" if place == "preempted" else "cancel", "attempt": 1})
        assert watched.wait_for_signal()
        assert watched.stops.reason == {"preempted": "preempted", "late": "deadline"}.get(place, "cancel")


@pytest.mark.parametrize(
    ("left", "step", "save", "stops"),
    [(60, 20, 20, False), (60, 30, 40, True), (60, 0, 0, False), (0.5, 0, 0, True), (-60, 30, 40, False)],
    ids=["fits", "does not", "unknown", "margin", "of an earlier allocation"],
)
def test_a_step_begins_only_if_it_and_its_checkpoint_end_before_the_deadline(tmp_path, left, step, save, stops):
    with Watched(tmp_path) as watched:
        watched.stops.save_s = [save]
        watched.stops._step_s.append(step)
        put(tmp_path, "deadline", {"time": time.time() + left})
        assert watched.stops.due_before_step() is stops
        assert not stops or watched.stops.reason == "deadline"


def test_the_watch_ends_with_the_run(tmp_path):
    before = threading.active_count()
    with Watched(tmp_path):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.diagnostics import RunLog, read_log
from megatron_rl.errors import UserError


def write(folder, steps, **more):
    with RunLog(folder) as log:
        for step in steps:
            log.append({"kind": "step", "step": step, "loss": step / 2, **more})


def steps(folder) -> list[int]:
    return [record["step"] for record in read_log(folder)]


def test_records_come_back_as_they_were_written(tmp_path):
    record = {"kind": "step", "step": 3, "loss": 0.1, "ok": True, "note": None, "tokens/total": 7}
    with RunLog(tmp_path) as log:
        log.append(record)
    assert read_log(tmp_path) == [record]


def test_array_scalars_are_unpacked_and_numbers_that_are_not_finite_become_null(tmp_path):
    with RunLog(tmp_path) as log:
        log.append({"step": np.int64(1), "a": np.float32(0.5), "b": torch.tensor(2.0), "c": math.nan, "d": -np.inf})
    assert read_log(tmp_path) == [{"step": 1, "a": 0.5, "b": 2.0, "c": None, "d": None}]


def test_a_second_log_on_the_folder_appends(tmp_path):
    write(tmp_path, [0, 1])
    write(tmp_path, [2])
    assert steps(tmp_path) == [0, 1, 2]


def test_resuming_moves_the_records_that_will_be_written_again_and_loses_none(tmp_path):
    write(tmp_path, range(5))
    RunLog(tmp_path, resume_from=3).close()
    assert steps(tmp_path) == [0, 1, 2]
    RunLog(tmp_path, resume_from=2).close()
    dropped = [json.loads(line)["step"] for line in (tmp_path / "log.dropped.jsonl").read_text().splitlines()]
    assert (steps(tmp_path), dropped) == ([0, 1], [3, 4, 2])


@pytest.mark.parametrize("resume_from", [None, 2])
def test_a_torn_last_line_is_set_aside_and_the_log_goes_on(tmp_path, resume_from):
    write(tmp_path, [0, 1])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 2, "lo')
    assert steps(tmp_path) == [0, 1]
    with RunLog(tmp_path, resume_from=resume_from) as log:
        log.append({"step": 2})
    assert steps(tmp_path) == [0, 1, 2]
    assert (tmp_path / "log.dropped.jsonl").read_text() == '{"kind": "step", "step": 2, "lo\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    write(tmp_path, [0, 1])
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(tmp_path, [2])
    assert steps(tmp_path) == [0, 1, 2]
    assert not (tmp_path / "log.dropped.jsonl").exists()


@pytest.mark.parametrize("damage", [b"", bytes(20), b"[" * 100_000, b'{"step": ' + b"9" * 5000], ids=len)
def test_a_malformed_line_in_the_middle_is_refused_by_file_and_line(tmp_path, damage):
    write(tmp_path, [0, 1])
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b"{", damage, 1))
    with pytest.raises(UserError, match=r"log.jsonl:1: not a JSON object"):
        read_log(tmp_path)
    with pytest.raises(UserError, match=r"log.jsonl:1"):
        RunLog(tmp_path)


def test_what_was_appended_survives_a_killed_process(tmp_path):
    program = """
        import os, signal, sys
        from megatron_rl.diagnostics import RunLog
        log = RunLog(sys.argv[1])
        for step in range(3):
            log.append({"step": step})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == [0, 1, 2]


def test_a_record_that_cannot_be_logged_is_refused_by_key_and_leaves_no_trace(tmp_path):
    bad = [({"loss": 1.0}, "'step'"), ({"step": 1, "a": ["x"]}, "'a' is a list"), ({"step": True}, "'step'")]
    with RunLog(tmp_path) as log:
        for record, message in bad:
            with pytest.raises(UserError, match=message):
                log.append(record)
    assert read_log(tmp_path) == []


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run log"):
        read_log(tmp_path)


def test_lists_of_numbers_are_logged(tmp_path):
    with RunLog(tmp_path) as log:
        log.append({"kind": "erpd", "step": 1, "losses": [1, 0.5, float("nan"), None]})
    assert read_log(tmp_path) == [{"kind": "erpd", "step": 1, "losses": [1, 0.5, None, None]}]


class Kept:
    """A logger that keeps what it receives, and raises on request."""

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.fails, self.received, self.closed = fails, [], False

    def start(self, config, folder, resume_from):
        raise AssertionError("the run log starts no logger")

    def log(self, record):
        if "log" in self.fails:
            raise RuntimeError("the disk of the logger is full")
        self.received.append(record)
        record["step"] = -1

    def close(self):
        self.closed = True
        if "close" in self.fails:
            raise OSError("no route to host")


def test_every_logger_receives_each_record_as_it_is_on_disk(tmp_path):
    first, second = Kept(), Kept()
    with RunLog(tmp_path) as log:
        log.add_logger("first", first)
        log.add_logger("second", second)
        log.append({"kind": "step", "step": np.int64(1), "loss": math.nan})
    assert [r["loss"] for r in second.received] == [None] and first.closed and second.closed
    assert read_log(tmp_path) == [{"kind": "step", "step": 1, "loss": None}]


def test_a_logger_that_raises_ends_the_run_with_its_name_and_the_record_is_in_the_log(tmp_path):
    broken, other = Kept(("log",)), Kept()
    with (
        pytest.raises(UserError, match=r"logger mine\.py:Mine failed on the eval record of step 4 .*the disk of the"),
        RunLog(tmp_path) as log,
    ):
        log.add_logger("mine.py:Mine", broken)
        log.add_logger("other", other)
        log.append({"kind": "eval", "step": 4})
    assert steps(tmp_path) == [4] and broken.closed and other.closed


def test_a_logger_that_cannot_be_closed_is_named_and_the_others_are_closed(tmp_path, capsys):
    loggers = [Kept(("close",)), Kept(("close",)), Kept()]
    with (
        pytest.raises(UserError, match=r"logger 0 failed while it was closed \(OSError: no route"),
        RunLog(tmp_path) as log,
    ):
        for number, logger in enumerate(loggers):
            log.add_logger(f"{number}", logger)
    assert all(logger.closed for logger in loggers)
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path) as log:
        log.add_logger("late", Kept(("close",)))
        raise KeyboardInterrupt
    assert "warning: logger late failed while it was closed" in capsys.readouterr().err

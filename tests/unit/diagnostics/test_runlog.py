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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_a_malformed_line_in_the_middle_is_refused_by_file_and_line(tmp_path):
    write(tmp_path, [0, 1])
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b"{", b"", 1))
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


def test_tensorboard_shows_the_same_scalars_and_forgets_the_steps_run_again(tmp_path):
    write(tmp_path, range(4))
    with RunLog(tmp_path, resume_from=2) as log:
        log.append({"kind": "step", "step": 2, "loss": 9.0})
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 9.0)]


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


def test_lists_of_numbers_are_logged_and_left_out_of_tensorboard(tmp_path):
    with RunLog(tmp_path) as log:
        log.append({"kind": "erpd", "step": 1, "losses": [1, 0.5, float("nan"), None]})
    assert read_log(tmp_path) == [{"kind": "erpd", "step": 1, "losses": [1, 0.5, None, None]}]
    written = b"".join(path.read_bytes() for path in (tmp_path / "tb").iterdir())
    assert written and b"losses" not in written

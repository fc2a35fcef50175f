"""Weights & Biases gets the records of a run. Offline: what its own process wrote to disk is read back."""

import json
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.config import Config, make_config
from megatron_rl.diagnostics import RunLog
from megatron_rl.diagnostics.samples import SampleLog, ShownSample
from megatron_rl.errors import ConfigError
from megatron_rl.loggers import check_loggers, start_loggers

_BLOCK, _HEADER, _FULL, _LAST = 32768, 7, 1, 4


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """No network, and no settings or keys of whoever runs the test."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))


def config(tmp_path: Path) -> Config:
    return make_config({"model": {"path": "m"}, "run": {"dir": str(tmp_path), "name": "ours", "loggers": ["wandb"]}})


def messages(file: Path) -> Iterator:
    """Yield the protobuf records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # too short for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        if at + _HEADER + length > len(data):  # still being written
            return
        parts += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (_FULL, _LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def finished(file: Path) -> list:
    """Return the records of a .wandb file once its run has ended: W&B's own process still writes after `finish`."""
    deadline = time.monotonic() + 60
    while True:
        found = list(messages(file))
        if found and found[-1].HasField("exit"):
            return found
        assert time.monotonic() < deadline, f"{file} does not end"
        time.sleep(0.05)


def read_run(folder: Path) -> list[dict]:
    """Return what each process wrote of the W&B run of a run folder: its id, resume mode, configuration and rows."""
    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        found = finished(file)
        (run,) = [m.run for m in found if m.HasField("run")][:1]
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        rows = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in m.history.item}
            for m in found
            if m.HasField("history")
        ]
        runs.append({"file": file, "run": run, "config": settings, "rows": rows})
    return runs


def train(settings: Config, first: int, last: int) -> None:
    with RunLog(settings.run.folder, first) as log:
        start_loggers(settings, first, log)
        for step in range(first, last):
            SampleLog(settings.run.folder).append([ShownSample(step, 7, "p", "1+1=", "two", 0.5, 3, "stop", None)])
            log.append({"kind": "step", "step": step, "entropy": 1 / (step + 1), "worst/max": [1.0], "loss": None})


def test_configuration_numbers_and_pictures_reach_wandb_under_an_id_that_a_resume_keeps(offline, tmp_path):
    settings = config(tmp_path)
    folder = settings.run.folder
    train(settings, 0, 3)
    (first,) = read_run(folder)
    run_id = (folder / "wandb_id").read_text()
    assert first["run"].run_id == run_id and first["file"].name == f"run-{run_id}.wandb"
    assert (first["run"].project, first["run"].display_name) == ("megatron_rl", "ours")
    assert first["config"]["rollout"]["samples_per_prompt"] == 8
    numbers = [(row["step"], row["entropy"]) for row in first["rows"] if "entropy" in row]
    assert numbers == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert not any("worst/max" in row or "loss" in row or "kind" in row for row in first["rows"])
    (last,) = [row["report/entropy/path"] for row in first["rows"] if "report/entropy/path" in row]
    picture = first["file"].parent / "files" / last
    assert picture.read_bytes() == (folder / "report" / "entropy.png").read_bytes()
    (table,) = [row["samples/path"] for row in first["rows"] if "samples/path" in row]
    samples = json.loads((first["file"].parent / "files" / table).read_text())
    assert samples["columns"][:2] == ["step", "trajectory"] and [row[0] for row in samples["data"]] == [0, 1, 2]
    assert samples["data"][2] == [2, 7, "p", "1+1=", "two", 0.5, 3, "stop", None]
    train(settings, 2, 4)
    runs = read_run(folder)
    assert {one["run"].run_id for one in runs} == {run_id} and sum(len(one["rows"]) for one in runs) == 7
    assert any(row["step"] == 3 for one in runs for row in one["rows"])


def test_a_run_that_fails_before_its_first_record_ends_without_a_report(offline, tmp_path):
    train(config(tmp_path), 0, 0)
    assert not (config(tmp_path).run.folder / "report").exists()


@pytest.mark.parametrize("leftover", [False, True], ids=["nothing", "a folder of runs"])
def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch, tmp_path, leftover):
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    if leftover:
        (tmp_path / "wandb").mkdir()
    with pytest.raises(ConfigError, match=r"run\.loggers: wandb .*pip install megatron_rl\[wandb\]"):
        check_loggers(["tensorboard", "wandb"])


def test_wandb_without_a_key_is_an_error_that_names_the_logger(offline, monkeypatch, tmp_path):
    """In a process of its own: within one process wandb remembers that it was offline."""
    program = """
        import sys
        from megatron_rl.config import make_config
        from megatron_rl.diagnostics import RunLog
        from megatron_rl.loggers import start_loggers
        run = {"dir": sys.argv[1], "name": "ours", "loggers": ["wandb"]}
        settings = make_config({"model": {"path": "m"}, "run": run})
        with RunLog(settings.run.folder) as log:
            start_loggers(settings, 0, log)
    """
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    assert "UserError: logger wandb failed to start (UsageError: No API key configured." in done.stderr

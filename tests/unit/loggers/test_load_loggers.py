"""Loggers are found and checked before the run starts, and an error names the place of the mistake."""

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rl.config import Config, load_config, make_config
from megatron_rl.diagnostics import RunLog
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.loggers import check_loggers, start_loggers

GOOD = """\
class Mine:
    def start(self, config, folder, resume_from):
        self.path = folder / "mine.txt"
        self.path.write_text(f"{config['run']['seed']} {resume_from}\\n")

    def log(self, record):
        with self.path.open("a") as file:
            file.write(f"{sorted(record)}\\n")

    def close(self):
        with self.path.open("a") as file:
            file.write("closed\\n")
"""


def config(tmp_path: Path, *loggers: str) -> Config:
    run = {"dir": str(tmp_path), "name": "run", "seed": 5, "loggers": list(loggers)}
    return make_config({"model": {"path": "m"}, "run": run})


def plugin(tmp_path: Path, text: str, name: str = "mine.py") -> str:
    (tmp_path / name).write_text(text)
    return f"{tmp_path / name}:Mine"


def test_a_class_of_the_user_is_a_logger(tmp_path):
    name = plugin(tmp_path, GOOD)
    check_loggers([name])
    settings = config(tmp_path, name)
    with RunLog(settings.run.folder) as log:
        start_loggers(settings, 3, log)
        log.append({"kind": "step", "step": 3})
    assert (settings.run.folder / "mine.txt").read_text() == "5 3\n['kind', 'step']\nclosed\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def log(self, record)", "def lock(self, record)"), r"mine\.py:1: class Mine has no method log\(record\)"),
        (
            ("def log(self, record)", "def log(self)"),
            r"mine\.py:6: Mine\.log is called as log\(record\), but .*\(self\)",
        ),
        (("def close(self)", "def close(self, code)"), r"mine\.py:10: Mine\.close is called as close\(\).*'code'"),
        (("config, folder, resume_from", "config"), r"mine\.py:2: Mine\.start is called as start\(config, folder, re"),
        (("class Mine:", "class Mine:\n    def __init__(self, url): ..."), r"mine\.py:1: Mine\.__init__ .*'url'"),
        (("class Mine:", "Mine = 3\nclass Other:"), "is a int, not a class"),
        (("class Mine:", "class Main:"), "has no 'Mine'; did you mean 'Main'"),
        (("class Mine:", "class Mine"), r"mine\.py:1 raised SyntaxError"),
    ],
    ids=["no method", "no record", "more arguments", "fewer", "constructor", "no class", "no name", "syntax"],
)
def test_a_class_that_is_no_logger_is_refused_with_its_line(tmp_path, change, message):
    assert change[0] in GOOD
    name = plugin(tmp_path, GOOD.replace(*change))
    with pytest.raises(ConfigError, match=message) as caught:
        check_loggers([name])
    assert str(caught.value).startswith("run.loggers: ")


def test_a_logger_that_cannot_start_is_named(tmp_path):
    name = plugin(tmp_path, GOOD.replace("self.path = folder", "self.path = folder / 1"))
    settings = config(tmp_path, name)
    message = f"logger {re.escape(name)} failed to start .TypeError: "
    with RunLog(settings.run.folder) as log, pytest.raises(UserError, match=message):
        start_loggers(settings, 0, log)


def test_a_file_is_relative_to_the_configuration_and_in_an_override_to_the_current_folder(tmp_path, monkeypatch):
    plugin(tmp_path, GOOD)
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\nrun: {loggers: [tensorboard, mine.py:Mine]}\n")
    assert load_config(path).run.loggers == ("tensorboard", f"{tmp_path}/mine.py:Mine")
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    assert load_config(path, ["run.loggers=[mine.py:Mine, a.b:C]"]).run.loggers == (f"{here}/mine.py:Mine", "a.b:C")
    check_loggers(load_config(path).run.loggers)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[tensorbord]", "there is no logger 'tensorbord'; did you mean 'tensorboard'?"),
        ("[wandb, wandb]", "'wandb' is given twice"),
        ("wandb", "'run.loggers' is 'wandb'"),
        ("[3]", "'run.loggers.0' is 3"),
    ],
)
def test_a_wrong_list_is_refused_by_the_configuration(tmp_path, value, message):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"run.loggers={value}"])
    assert message in str(caught.value)


def test_no_logger_is_a_choice(tmp_path):
    settings = config(tmp_path)
    with RunLog(settings.run.folder) as log:
        start_loggers(settings, 0, log)
        log.append({"step": 0})
    assert [path.name for path in settings.run.folder.iterdir()] == ["log.jsonl"]


def test_tensorboard_shows_the_same_numbers_and_forgets_the_steps_run_again(tmp_path):
    settings = config(tmp_path, "tensorboard")
    for first, last, scale in ((0, 4, 0.5), (2, 3, 4.5)):
        with RunLog(settings.run.folder, first) as log:
            start_loggers(settings, first, log)
            for step in range(first, last):
                log.append({"kind": "step", "step": step, "loss": step * scale, "lists": [1.0, None]})
    board = EventAccumulator(str(settings.run.folder / "tb"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 9.0)]
    assert board.Tags()["scalars"] == ["loss"]

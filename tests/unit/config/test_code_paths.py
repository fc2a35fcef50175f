"""Import paths in a configuration: relative to its file, or to the current folder in an override."""

from pathlib import Path

import pytest

from megatron_rl.config import load_config, make_config
from megatron_rl.config.code_paths import code_digests, code_paths
from megatron_rl.config.schema import BUILT_IN_TASKS
from megatron_rl.errors import ConfigError
from megatron_rl.tasks import TASKS

TEXT = "model: {path: m}\ntask: {name: 'mine.py:Mine', reward: 'sub/r.py:f'}\nobjective: {name: 'o.py:O'}\n"


def test_relative_files_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    file = tmp_path / "there" / "a.yaml"
    file.write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    config = load_config(Path("there/a.yaml"))
    assert code_paths(config) == {
        "task.name": f"{there}/mine.py:Mine",
        "task.reward": f"{there}/sub/r.py:f",
        "objective.name": f"{there}/o.py:O",
    }
    overrides = ["task.reward=r.py:f", "objective={name: erpd, teacher: {name: 't.py:T'}}", "task.name=math"]
    changed = load_config(file, [*overrides, "task.data=x"])
    assert code_paths(changed) == {
        "task.reward": f"{tmp_path}/r.py:f",
        "objective.teacher.name": f"{tmp_path}/t.py:T",
    }
    copy = tmp_path / "resolved.yaml"
    copy.write_text(config.dump())
    assert load_config(copy) == config


def test_modules_and_urls_stay_as_they_are(tmp_path):
    config = make_config({"model": {"path": "m"}, "task": {"name": "pkg.mod:T", "reward": "http://h:1/x"}})
    assert code_paths(config) == {"task.name": "pkg.mod:T"}


def test_digests_are_those_of_the_sources(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {path: m}\ntask: {reward: 'r.py:f'}\n")
    config = load_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=f"task.reward: there is no file {tmp_path}/r.py"):
        code_digests(config)
    (tmp_path / "r.py").write_text("a = 1\n")
    before = code_digests(config)
    (tmp_path / "r.py").write_text("a = 2\n")
    assert list(before) == ["task.reward"] and before != code_digests(config)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "maht"}, "task.name: it is 'maht'; did you mean 'math'?"),
        ({"reward": "reward.py"}, "task.reward: it is 'reward.py'; give file.py:function"),
        ({"reward": "ftp://host/x"}, "task.reward: it is 'ftp://host/x'"),
        ({"reward_timeout_s": 0}, "task.reward_timeout_s"),
        ({"reward_on_error": "ignore"}, "task.reward_on_error"),
    ],
)
def test_a_name_that_is_neither_known_nor_an_import_path_is_refused(task, message):
    with pytest.raises(ConfigError) as refused:
        make_config({"model": {"path": "m"}, "task": task})
    assert message in str(refused.value)


def test_every_built_in_task_has_a_class():
    assert tuple(TASKS) == BUILT_IN_TASKS

"""A run does not go on with other code of the user's own, unless that is asked for."""

import hashlib
import json

import pytest

from megatron_rl.config import make_config
from megatron_rl.errors import ConfigError
from megatron_rl.trainer.code_record import check_code, write_code
from megatron_rl.trainer.run_folder import check_run_folder


@pytest.fixture
def run(tmp_path):
    """A configuration with a reward and an objective, and its files."""
    (tmp_path / "r.py").write_text("def f(): return 1\n")
    (tmp_path / "o.py").write_text("from megatron_rl.objectives.drpo import DRPO as O\n")
    sections = {"task": {"reward": f"{tmp_path}/r.py:f"}, "objective": {"name": f"{tmp_path}/o.py:O"}}
    config = make_config({"model": {"path": "m"}, "run": {"dir": str(tmp_path), "name": "mine"}, **sections})
    config.run.folder.mkdir()
    return config


def sha(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def test_the_record_names_every_source_and_its_digest(run, tmp_path):
    write_code(run)
    assert json.loads((run.run.folder / "plugins.json").read_text()) == {
        "task.reward": {"path": f"{tmp_path}/r.py:f", "sha256": sha("def f(): return 1\n")},
        "objective.name": {
            "path": f"{tmp_path}/o.py:O",
            "sha256": sha("from megatron_rl.objectives.drpo import DRPO as O\n"),
        },
    }
    check_code(run)


def test_changed_code_is_refused_with_both_digests_until_it_is_accepted(run, tmp_path):
    check_code(run)  # a run of an older version has no record
    write_code(run)
    (tmp_path / "r.py").write_text("def f(): return 2\n")
    old, new = sha("def f(): return 1\n"), sha("def f(): return 2\n")
    message = rf"task.reward: .*/r.py has changed .* SHA-256 is {new}, and .*plugins.json has {old}; .*--accept-changed"
    with pytest.raises(ConfigError, match=message):
        check_run_folder(run, resume=True)
    check_run_folder(run, resume=True, accept_changed_code=True)
    write_code(run)
    check_run_folder(run, resume=True)


def test_accepting_changed_code_is_about_a_run_that_goes_on(run):
    with pytest.raises(ConfigError, match="pass it together with --resume"):
        check_run_folder(run, resume=False, accept_changed_code=True)


def test_a_run_without_code_of_its_own_has_no_record(run):
    write_code(run)
    plain = run.model_copy(update={"task": make_config({"model": {"path": "m"}}).task})
    check_code(plain)
    write_code(plain.model_copy(update={"objective": make_config({"model": {"path": "m"}}).objective}))
    assert list(run.run.folder.iterdir()) == []

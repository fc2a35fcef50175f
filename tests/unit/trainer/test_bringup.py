"""Only one process at a time uses a run folder."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_rl.config import make_config
from megatron_rl.errors import ConfigError
from megatron_rl.files import try_lock
from megatron_rl.trainer.bringup import _prepare_folder


def test_a_run_folder_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    config = make_config({"model": {"path": "nowhere"}, "run": {"dir": str(tmp_path), "name": "mine"}})
    with ExitStack() as first, ExitStack() as second:
        _prepare_folder(config, False, first)
        before = (tmp_path / "mine" / "config.yaml").read_text()
        with pytest.raises(ConfigError, match="mine is in use by another process: wait for it or end it"):
            _prepare_folder(config, True, second)
        assert (tmp_path / "mine" / "config.yaml").read_text() == before
        assert try_lock(tmp_path / "mine" / "in-use") is None
    with ExitStack() as later:
        _prepare_folder(config, True, later)

"""A run folder is used by one process at a time, and only if everything in it can be read and written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_rl.config import Config, make_config
from megatron_rl.errors import ConfigError, MegatronRLError
from megatron_rl.files import try_lock
from megatron_rl.trainer.run_folder import check_run_folder, prepare_run_folder
from tests.cases.run_folders import CASES, PERMISSIONS, FolderCase

NOBODY = 65534


def settings(parent: Path) -> Config:
    """Return the configuration of a run in this folder."""
    return make_config({"model": {"path": "nowhere"}, "run": {"dir": str(parent), "name": "mine"}})


def assert_right(case: FolderCase, parent: Path) -> None:
    """Check the outcome of a case before anything starts; and what is accepted there can be made ready."""
    config, run = settings(parent), parent / "mine"
    case.make(parent, run)
    if case.refusal is not None:
        before = sorted(parent.rglob("*")) if os.access(parent, os.X_OK, effective_ids=True) else []
        with pytest.raises(MegatronRLError) as refused:
            check_run_folder(config, resume=case.resume)
        assert case.refusal.replace("RUN", str(run)).replace("DIR", str(parent)) in str(refused.value)
        assert not before or sorted(parent.rglob("*")) == before, "a refused folder is left as it is"
        return
    check_run_folder(config, resume=case.resume)
    with ExitStack() as stack:
        prepare_run_folder(config, stack, resume=case.resume)
        assert (run / "config.yaml").read_text() == config.dump()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_run_folder_is_used_or_refused(case: FolderCase, tmp_path: Path) -> None:
    assert_right(case, tmp_path / "runs")


@pytest.fixture
def place_of_nobody() -> Iterator[Path]:
    """A folder that a user without rights owns, who this process is meanwhile."""
    place = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(place, NOBODY, -1)
        os.seteuid(NOBODY)
    try:
        yield place
    finally:
        if is_root:
            os.seteuid(0)
        for path in (place / "runs", place / "runs" / "mine"):
            if path.exists():
                path.chmod(0o700)
        shutil.rmtree(place)


@pytest.mark.parametrize("case", PERMISSIONS, ids=[case.name for case in PERMISSIONS])
def test_a_folder_that_may_not_be_written_is_refused(case: FolderCase, place_of_nobody: Path) -> None:
    assert_right(case, place_of_nobody / "runs")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses to make folders")
def test_a_file_system_that_refuses_is_a_configuration_error() -> None:
    with ExitStack() as stack, pytest.raises(ConfigError, match="/proc/self"):
        prepare_run_folder(settings(Path("/proc/self/runs")), stack, resume=False)


def test_a_run_folder_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with ExitStack() as first, ExitStack() as second:
        prepare_run_folder(config, first, resume=False)
        before = (tmp_path / "mine" / "config.yaml").read_text()
        with pytest.raises(ConfigError, match="mine is in use by another process: wait for it or end it"):
            prepare_run_folder(config, second, resume=True)
        assert (tmp_path / "mine" / "config.yaml").read_text() == before
        assert try_lock(tmp_path / "mine" / "in-use") is None
    with ExitStack() as later:
        prepare_run_folder(config, later, resume=True)

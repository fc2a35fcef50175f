"""A weight update that failed is made again where that can help; a run folder has one process at a time."""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.claim import claim
from megatron_rl.config import make_config
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.trainer.bringup import Run, _prepare_folder


def publish(*outcomes: tuple[list[str], list[str]] | None) -> int:
    """How often an update is pushed when pushes end like that: engines left and those of them held, or None for success."""
    pool = SimpleNamespace(live_urls=("a", "b"), held={}, lost={})
    pushed = []

    def push(_: Any, version: int) -> None:
        pushed.append(version)
        outcome = outcomes[len(pushed) - 1]
        if outcome is not None:
            pool.live_urls, pool.held = tuple(outcome[0]), dict.fromkeys(outcome[1], "half updated")
            raise EngineError("the update failed")

    def raise_everywhere(error: EngineError) -> None:
        raise error

    mesh = SimpleNamespace(rank=0, on_lead=lambda call: call(), raise_everywhere=raise_everywhere)
    sync = SimpleNamespace(readmit=lambda: (), push=push)
    policy = SimpleNamespace(export=lambda plan: iter(()))
    Run.publish(SimpleNamespace(mesh=mesh, sync=sync, pool=pool, policy=policy, precision=None), 5)  # type: ignore[arg-type]
    assert set(pushed) == {5}
    return len(pushed)


def test_an_update_that_lost_an_engine_is_made_again_with_those_left() -> None:
    assert publish((["a"], []), None) == 2


def test_an_engine_that_holds_some_of_both_versions_is_given_the_whole_update_once_more() -> None:
    assert publish((["a", "b"], ["b"]), None) == 2
    with pytest.raises(EngineError):
        publish((["a", "b"], ["b"]), (["a", "b"], ["b"]), None)
    assert publish((["a", "b"], ["b"]), (["a"], []), None) == 3


def test_an_update_that_left_every_engine_whole_is_not_repeated() -> None:
    with pytest.raises(EngineError, match="the update failed"):
        publish((["a", "b"], []), None)


def test_without_any_engine_left_the_error_says_so() -> None:
    with pytest.raises(EngineError, match="the update failed; engines lost so far"):
        publish(([], []), None)


def test_a_run_folder_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    config = make_config({"model": {"path": "nowhere"}, "run": {"dir": str(tmp_path), "name": "mine"}})
    with ExitStack() as first, ExitStack() as second:
        _prepare_folder(config, False, first)
        before = (tmp_path / "mine" / "config.yaml").read_text()
        with pytest.raises(ConfigError, match="mine is in use by another process: wait for it or end it"):
            _prepare_folder(config, True, second)
        assert (tmp_path / "mine" / "config.yaml").read_text() == before
        assert claim(tmp_path / "mine" / "in-use") is None
    with ExitStack() as later:
        _prepare_folder(config, True, later)

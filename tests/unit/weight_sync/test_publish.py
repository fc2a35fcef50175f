"""A failed weight update is retried if a retry can help."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.errors import EngineError
from megatron_rl.weight_sync.publish import publish_weights


def publish(*outcomes: tuple[list[str], list[str]] | None, lost: dict[str, str] = {}) -> int:  # noqa: B006
    """Return how often an update is pushed. An outcome is (live engines, quarantined engines), or None for success."""
    pool = SimpleNamespace(live_urls=("a", "b"), quarantined={}, lost=lost, recover_lost=lambda: ())
    pushed = []

    def push(_: Any, version: int) -> None:
        pushed.append(version)
        outcome = outcomes[len(pushed) - 1]
        if outcome is not None:
            pool.live_urls, pool.quarantined = tuple(outcome[0]), dict.fromkeys(outcome[1], "half updated")
            raise EngineError("the update failed")

    def raise_everywhere(error: EngineError) -> None:
        raise error

    mesh = SimpleNamespace(rank=0, on_lead=lambda call: call(), raise_everywhere=raise_everywhere)
    sync = SimpleNamespace(push=push, engines=pool, forget=lambda urls: None)
    policy = SimpleNamespace(export=lambda plan: iter(()), mesh=mesh)
    publish_weights(policy, sync, None, 5)  # type: ignore[arg-type]
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
    with pytest.raises(EngineError, match=r"the update failed; engines lost so far: a: it ended; b: it is silent$"):
        publish(([], []), None, lost={"a": "it ended", "b": "it is silent"})
    with pytest.raises(EngineError, match=r"^the update failed$"):  # both are being started again
        publish(([], []), None)

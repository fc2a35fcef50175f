"""Every response of the table is right, redone elsewhere, waited for, or an error that names engine and request."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_rl.engines.pool import EnginePool, GenerationRequest, SamplingParams
from megatron_rl.errors import EngineError
from tests.cases.engine_responses import (
    STATUSES,
    VOCAB,
    WRONG_CONTROLS,
    WRONG_SAMPLES,
    Status,
    WrongControl,
    WrongSample,
)
from tests.unit.engines.scripted_server import Reply, ScriptedServer, right_samples


@pytest.fixture(scope="module")
def right() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(scope="module")
def other() -> Iterator[ScriptedServer]:
    """Yield a server whose responses the test chooses."""
    with ScriptedServer() as server:
        yield server


def request(n: int = 1, **more: Any) -> GenerationRequest:
    return GenerationRequest("s1-t0", (3, 4, 5), n, SamplingParams(6), **more)


def tokens(pool: EnginePool, asked: GenerationRequest) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in pool.generate([asked])[0]]


@pytest.mark.parametrize("case", WRONG_SAMPLES, ids=lambda case: case.name)
def test_a_wrong_response_is_redone_elsewhere_or_names_engine_and_request(
    case: WrongSample, right: ScriptedServer, other: ScriptedServer
) -> None:
    other.respond = lambda path, body: Reply(case.spoil(right_samples(body)), 200, case.headers)
    asked = request(case.n, **case.more)
    with EnginePool([other.url, right.url], 20, vocab_size=VOCAB) as pool:
        assert tokens(pool, asked) == [[7, 8]] * case.n
        assert pool.live_urls == (other.url, right.url), "a wrong response alone does not make an engine lost"
    other.asked.clear()
    with EnginePool([other.url], 20, vocab_size=VOCAB) as pool:
        with pytest.raises(EngineError, match=case.words) as caught:
            pool.generate([asked])
        assert other.url in str(caught.value) and len(str(caught.value)) < 1000
        assert "'s1-t0'" in str(caught.value) and len(other.asked) == 3, "it is redone, and not for ever"


@pytest.mark.parametrize("case", STATUSES, ids=lambda case: f"{case.status} {case.outcome} {case.headers}")
def test_a_status_says_later_again_or_no(case: Status, other: ScriptedServer) -> None:
    times: list[float] = []

    def respond(path: str, body: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        again = len(times) > 2
        return Reply(right_samples(body)) if again else Reply({"error": "not now"}, case.status, case.headers)

    other.respond = respond
    with EnginePool([other.url], 20) as pool:
        if case.outcome == "refused":
            with pytest.raises(EngineError, match=re.escape(str(case.status))):
                pool.generate([request()])
            assert len(times) == 1
        else:
            assert tokens(pool, request()) == [[7, 8]] and len(times) == 3
            assert pool.live_urls == (other.url,)
    if case.headers.get("retry-after") == "1":
        assert times[1] - times[0] >= 1, "the server's time is kept"


@pytest.mark.parametrize("headers", [{}, {"retry-after": "3600"}])
def test_waiting_for_a_server_that_always_says_later_is_bounded(headers: dict[str, str], other: ScriptedServer) -> None:
    other.respond = lambda path, body: Reply({"error": "queue full"}, 429, headers)
    with EnginePool([other.url], 0.5) as pool, pytest.raises(EngineError, match=r"put the request off .*queue full"):
        pool.generate([request()])


def test_a_control_call_is_repeated_when_the_server_says_later(other: ScriptedServer) -> None:
    replies = [Reply({}, 429), Reply({}, 425), Reply({"weight_version": "3"})]
    other.respond = lambda path, body: replies.pop(0)
    with EnginePool([other.url], 20) as pool:
        assert pool.weight_version(other.url) == "3"


@pytest.mark.parametrize("case", WRONG_CONTROLS, ids=lambda case: case.name)
def test_a_wrong_response_to_a_control_call_names_the_engine(case: WrongControl, other: ScriptedServer) -> None:
    other.respond = lambda path, body: Reply(case.body, 200, case.headers)
    with EnginePool([other.url], 20) as pool, pytest.raises(EngineError) as caught:
        getattr(pool, case.method)(other.url, *case.arguments)
    assert other.url in str(caught.value)

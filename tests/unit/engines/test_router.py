"""After a change of its servers, the router gets some time to find them healthy."""

import asyncio

import httpx
import pytest

from megatron_rl.engines import router
from megatron_rl.engines.router import Router

A, B = "http://a", "http://b"


def route_to_both(*healthy: bool) -> int:
    """Route to A and B. The router finds B healthy as in `healthy`, one listing each. Return how many were asked."""
    listings = iter([False, *healthy])

    def respond(request: httpx.Request) -> httpx.Response:
        assert request.method == "GET", "both are listed"
        states = {A: True, B: next(listings)}
        workers = [{"url": url, "id": url, "is_healthy": state} for url, state in states.items()]
        return httpx.Response(200, json={"workers": workers})

    async def route() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond)) as http:
            await Router("http://router", http).route_to([A, B])

    asyncio.run(route())
    return len(healthy) - len(list(listings))


def test_a_server_that_the_router_has_not_found_healthy_is_waited_for() -> None:
    assert route_to_both(True) == 1
    assert route_to_both(False, False, True, True) == 3


def test_the_run_goes_on_without_a_server_that_stays_unhealthy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(router, "_HEALTHY_S", 0.2)
    assert 1 < route_to_both(*[False] * 100) < 100
    assert f"does not send requests to {B} yet" in caplog.text

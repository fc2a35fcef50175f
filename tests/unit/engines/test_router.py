"""A change of the router's servers has taken effect when the router sends requests to each of them."""

import asyncio

import httpx
import pytest

from megatron_rl.engines import router
from megatron_rl.engines.router import Router
from megatron_rl.errors import EngineError

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


def test_the_wait_for_a_server_that_stays_unhealthy_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "_CHANGE_S", 0.2)
    with pytest.raises(EngineError, match=f"asked to route to {A}, {B} and does not"):
        route_to_both(*[False] * 100)

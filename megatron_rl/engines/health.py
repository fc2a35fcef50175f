"""Health checks of servers. A slow server does not count as dead; a dead server is found without a long wait."""

import logging
from concurrent.futures import Future
from contextlib import suppress

import httpx

from megatron_rl.engines.http_call import ResponseTooLarge, call, says_later
from megatron_rl.engines.pooled_engine import PooledEngine

_log = logging.getLogger(__name__)

HEALTH_S = 5.0  # time for a response; SGLang's takes a second by itself
CONNECT_S = 1.0
MISSES = 3  # checks in a row without a response, after which a server counts as dead


async def check_health(
    http: httpx.AsyncClient, engine: PooledEngine, path: str = "/health", timeout_s: float = 0
) -> bool | None:
    """Check a server once.

    Args:
        http: the client.
        engine: the engine. If it is paused, /model_info is requested instead of `path`.
        path: path of the request.
        timeout_s: seconds for the response; 0: `HEALTH_S`.

    Returns:
        True if the server is healthy, or limits requests; False if it reports an error or no process listens; None
        without a response in time.
    """
    if engine.paused:  # SGLang's /health generates a token, and a paused engine generates none
        path = "/model_info"
    timeout = httpx.Timeout(timeout_s or HEALTH_S, connect=CONNECT_S)
    try:
        response = await call(http, "GET", f"{engine.url}{path}", timeout=timeout)
    except httpx.TimeoutException:
        return None
    except (httpx.HTTPError, ResponseTooLarge):
        return False
    return response.status_code == 200 or says_later(response)


async def is_alive(http: httpx.AsyncClient, engine: PooledEngine, path: str = "/health") -> bool:
    """Return whether a server is healthy. It is checked up to `MISSES` times, because a busy server may respond late.

    Args:
        http: the client.
        engine: the engine.
        path: path of the request.
    """
    for _ in range(MISSES):
        healthy = await check_health(http, engine, path)
        if healthy is not None:
            return healthy
    return False


async def resume_paused(http: httpx.AsyncClient, engine: PooledEngine) -> None:
    """Resume a server that was left paused. A server that cannot be reached is ignored."""
    with suppress(httpx.HTTPError, ResponseTooLarge):
        timeout = httpx.Timeout(HEALTH_S, connect=CONNECT_S)
        await call(http, "POST", f"{engine.url}/continue_generation", json={}, timeout=timeout)


def log_unexpected_end(watch: "Future[None]") -> None:
    """Log an error if the health-check task ends while the pool is alive."""
    if not watch.cancelled() and watch.exception() is not None:
        _log.error("servers are not watched any more", exc_info=watch.exception())

"""Whether a server lives: one that is slow to answer is not dead, and one that is dead is not waited for."""

import logging
from concurrent.futures import Future
from contextlib import suppress

import httpx

from megatron_rl.engines.pooled_engine import PooledEngine

_log = logging.getLogger(__name__)

HEALTH_S = 5.0  # time for an answer; SGLang's takes a second by itself
CONNECT_S = 1.0
MISSES = 3  # looks in a row without an answer, after which a server counts as dead


async def check_health(
    http: httpx.AsyncClient, engine: PooledEngine, path: str = "/health", timeout_s: float = 0
) -> bool | None:
    """One look: healthy, not (it says so, or nobody listens), or None without an answer in time."""
    if engine.paused:  # SGLang's /health generates a token, which it then never does
        path = "/model_info"
    try:
        answer = await http.get(f"{engine.url}{path}", timeout=httpx.Timeout(timeout_s or HEALTH_S, connect=CONNECT_S))
        return answer.status_code == 200
    except httpx.TimeoutException:
        return None
    except httpx.HTTPError:
        return False


async def is_alive(http: httpx.AsyncClient, engine: PooledEngine, path: str = "/health") -> bool:
    """After as many looks as it takes to tell a busy server from a dead one."""
    for _ in range(MISSES):
        healthy = await check_health(http, engine, path)
        if healthy is not None:
            return healthy
    return False


async def resume_paused(http: httpx.AsyncClient, engine: PooledEngine) -> None:
    """Have a server go on that somebody left paused, if it can be reached."""
    with suppress(httpx.HTTPError):
        await http.post(
            f"{engine.url}/continue_generation", json={}, timeout=httpx.Timeout(HEALTH_S, connect=CONNECT_S)
        )


def log_unexpected_end(watch: "Future[None]") -> None:
    """Of a pool's watch over its servers, which is not to end unnoticed before the pool does."""
    if not watch.cancelled() and watch.exception() is not None:
        _log.error("servers are not watched any more", exc_info=watch.exception())

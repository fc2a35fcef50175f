"""Client of sglang-router: it sets to which servers the router may send requests.

Generation goes through the router. Control calls go to each server directly: a weight update is between the trainer and
a server. Contract of sglang-router 0.3.2: GET and POST /workers, DELETE /workers/{id}. Changes are queued and take
effect a moment later. The router forwards only a fixed set of fields of /generate.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

import httpx

from megatron_rl.engines.http_call import Patience, call, put_off_error, says_later
from megatron_rl.errors import EngineError
from megatron_rl.protocol.generation import error_message

_CHANGE_S = 60.0  # time for a queued change of the router's servers
# Time for the router to find a server healthy, until which it sends it no request. The others get requests meanwhile.
_HEALTHY_S = 10.0
_POLL_S = 0.05

_log = logging.getLogger(__name__)


class Router:
    """A router at `url`, over the pool's connections. Use it only in the pool's loop."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url, self._http = url, http
        self._routed: frozenset[str] | None = None
        self._changing = asyncio.Lock()

    async def route_to(self, urls: Iterable[str]) -> None:
        """Set the router's servers, and wait until the change has taken effect.

        Raises EngineError if the router does not respond or does not change.
        """
        wanted = frozenset(urls)
        async with self._changing:
            if wanted != self._routed:
                self._routed = None
                await self._change(wanted)
                self._routed = wanted

    async def _change(self, wanted: frozenset[str]) -> None:
        workers = await self._workers()
        for url, worker in workers.items():
            if url not in wanted:
                await self._call("DELETE", f"/workers/{worker['id']}")
        for url in wanted - workers.keys():
            await self._call("POST", "/workers", {"url": url})
        end = time.monotonic() + _CHANGE_S
        while (workers := await self._workers()).keys() != wanted:
            if time.monotonic() > end:
                raise EngineError(
                    f"sglang-router at {self.url} was asked to route to {', '.join(sorted(wanted))} and does not"
                )
            await asyncio.sleep(_POLL_S)
        end = time.monotonic() + _HEALTHY_S
        while unhealthy := [url for url, worker in workers.items() if not worker["is_healthy"]]:
            if time.monotonic() > end:
                _log.warning("sglang-router %s does not send requests to %s yet", self.url, ", ".join(unhealthy))
                return
            await asyncio.sleep(_POLL_S)
            workers = await self._workers()

    async def _workers(self) -> dict[str, dict[str, Any]]:
        """Return the router's servers: URL -> what the router knows of it, `id` and `is_healthy`."""
        listed = await self._call("GET", "/workers")
        try:
            workers = listed["workers"]
            return {
                str(worker["url"]).rstrip("/"): {key: worker[key] for key in ("id", "is_healthy")} for worker in workers
            }
        except (KeyError, TypeError) as error:
            raise EngineError(f"sglang-router {self.url}/workers lists no servers: {str(listed)[:200]}") from error

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        later = Patience(_CHANGE_S)
        while True:
            try:
                response = await call(self._http, method, f"{self.url}{path}", json=body, timeout=10.0)
            except httpx.HTTPError as error:
                raise EngineError(router_lost(self.url, f"{type(error).__name__} {error}".strip())) from error
            if not says_later(response):
                break
            if not await later.wait(response):
                raise put_off_error(self.url, path, response, later.limit_s)
        if response.status_code not in (200, 202):
            raise EngineError(
                f"sglang-router {self.url}{path} refused ({response.status_code}): {error_message(response)}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise EngineError(f"sglang-router {self.url}{path} does not respond in JSON") from error


def router_lost(url: str, reason: str) -> str:
    """Return the error message for a router that does not respond. No request bypasses the router."""
    return (
        f"sglang-router at {url} is gone ({reason}): see router.log, and resume the run, or resume it with "
        "rollout.sglang.router: false"
    )

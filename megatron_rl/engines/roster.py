"""The engines of a pool: which of them may get requests, which are lost, and how that is found out.

Use it only in the pool's loop.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Sequence

import httpx

from megatron_rl.engines.health import MISSES, check_health, is_alive, resume_paused
from megatron_rl.engines.pooled_engine import PooledEngine
from megatron_rl.engines.router import Router, router_lost
from megatron_rl.errors import EngineError

_log = logging.getLogger(__name__)

_RECOVER_S = 2.5  # time for the health check of a lost engine, made at every weight update
_WATCH_S = 5.0  # between health checks of servers with unfinished requests
_QUARANTINE_S = 30.0  # time a request waits while every live engine is quarantined
_POLL_S = 0.1


class Roster:
    """The engines of a pool, and the router in front of them if there is one.

    Args:
        urls: base URLs of the engines; at least one.
        http: the pool's client.
        router_url: URL of the router; None: requests go to the engines directly.

    Attributes:
        engines: all engines, lost ones too.
        front: the router, to which requests are sent; None without one.
    """

    def __init__(self, urls: Sequence[str], http: httpx.AsyncClient, router_url: str | None) -> None:
        self.engines = [PooledEngine(url.rstrip("/")) for url in dict.fromkeys(urls)]
        self._http = http
        self._router = Router(router_url, http) if router_url else None
        self.front = PooledEngine(router_url) if router_url else None

    @property
    def live(self) -> list[PooledEngine]:
        """The engines that are not lost."""
        return [engine for engine in self.engines if engine.live]

    def find(self, url: str) -> PooledEngine:
        """Return the engine with this base URL. Raises EngineError if it is not one of the pool."""
        for engine in self.engines:
            if engine.url == url.rstrip("/"):
                return engine
        raise EngineError(f"{url} is not an engine of this pool: {', '.join(e.url for e in self.engines)}")

    async def choose(self, avoided: Collection[PooledEngine] = ()) -> PooledEngine:
        """Return the router, or the least loaded engine that may get requests.

        Waits while every live engine is quarantined. Engines in `avoided` are chosen only if there is no other one.
        Raises EngineError if no engine is left.
        """
        end = time.monotonic() + _QUARANTINE_S
        while True:
            live = self.live
            if not live:
                reasons = "; ".join(f"{engine.url}: {engine.lost_because}" for engine in self.engines)
                raise EngineError(f"no engine is left ({reasons}): start them again and resume the run")
            routed = [engine for engine in live if engine.routable]
            if routed:
                wanted = [engine for engine in routed if engine not in avoided] or routed
                return await self._through_router(routed) or min(wanted, key=lambda engine: engine.load)
            if any(engine.paused for engine in live):  # a weight update is in progress
                end = time.monotonic() + _QUARANTINE_S
            if time.monotonic() > end:
                reasons = "; ".join(f"{engine.url}: {engine.quarantined_because}" for engine in live)
                mend = "the next weight update brings them back; a run that ends here can be resumed"
                raise EngineError(f"no engine serves the committed weights ({reasons}): {mend}")
            await asyncio.sleep(_POLL_S)

    async def _through_router(self, routed: Sequence[PooledEngine]) -> PooledEngine | None:
        """Let the router send requests to exactly these engines and return it. Return None if there is no router."""
        if self._router is None or self.front is None:
            return None
        if not self.front.live:
            raise EngineError(router_lost(self.front.url, self.front.lost_because))
        await self._router.route_to(engine.url for engine in routed)
        self.front.version = min(engine.version for engine in routed)
        return self.front

    def mark_lost(self, engine: PooledEngine, reason: str) -> None:
        """Mark an engine as lost. Its requests are redone elsewhere."""
        if engine.live:
            engine.lost_because = reason or "no reason was given"
            engine.dead.set()
            _log.warning("engine %s is %s: %s", engine.url, engine.state, engine.lost_because)
            if self.front is not None and self.front.live and engine is not self.front:
                # The router does not report which requests this engine has, so all requests in the router are redone.
                self.front.dead.set()
                self.front.dead = asyncio.Event()

    def expect(self, url: str, why: str) -> None:
        """Let the next weight update look for an engine at this URL. One that is there now is lost."""
        known = next((engine for engine in self.engines if engine.url == url), None)
        if known is None:
            known = PooledEngine(url, lost_because=why)
            self.engines.append(known)
            _log.warning("engine %s is awaited at the next weight update: %s", url, why)
        known.retired = False
        self.mark_lost(known, why)

    def retire(self, url: str, why: str) -> None:
        """Use the engine at this URL no more, until it is expected again."""
        engine = next((engine for engine in self.engines if engine.url == url), None)
        if engine is not None:
            self.mark_lost(engine, why)
            engine.retired = True

    def quarantine(self, engine: PooledEngine, reason: str) -> None:
        """Send no new request to an engine until a weight update succeeds."""
        engine.quarantined_because = reason
        _log.warning("engine %s is %s: %s", engine.url, engine.state, reason)

    async def check_after_failure(self, engine: PooledEngine, what: str) -> None:
        """Check an engine whose request failed. If it is not healthy, it is lost."""
        if engine.live and not await is_alive(self._http, engine):
            self.mark_lost(engine, what)
        elif engine is self.front:
            await self.find_lost("/health")  # the router reports that a server failed, but not which one

    async def find_lost(self, path: str) -> None:
        """Check every live engine with this call. Those that do not respond are lost."""
        live = self.live
        health = await asyncio.gather(*(is_alive(self._http, engine, path) for engine in live))
        for engine, healthy in zip(live, health, strict=True):
            if not healthy:
                self.mark_lost(engine, "it does not respond")

    async def watch(self) -> None:
        """Mark servers as lost that have unfinished requests and miss several health checks. Never returns.

        This is needed because a failed node closes no connection.
        """
        misses: dict[str, int] = {}
        while True:
            await asyncio.sleep(_WATCH_S)
            front = [self.front] if self.front is not None else []
            through = any(engine.load for engine in front)
            busy = [engine for engine in [*front, *self.engines] if engine.live and (engine.load or through)]
            try:
                health = await asyncio.gather(*(check_health(self._http, engine) for engine in busy))
            except EngineError as error:  # this machine could not open a connection: no engine is to blame
                _log.warning("servers were not checked: %s", error)
                continue
            missed = [engine for engine, healthy in zip(busy, health, strict=True) if not healthy]
            misses = {engine.url: misses.get(engine.url, 0) + 1 for engine in missed}
            for engine in missed:
                if misses[engine.url] == MISSES:
                    self.mark_lost(engine, f"{MISSES} health checks in a row failed")

    async def wait_healthy(self, timeout_s: float, wake: bool) -> None:
        """Wait until every live engine is healthy; see `EnginePool.wait_healthy`."""
        end = time.monotonic() + timeout_s
        waiting = self.live
        while True:
            if wake:
                await asyncio.gather(*(resume_paused(self._http, engine) for engine in waiting))
            health = await asyncio.gather(*(check_health(self._http, engine) for engine in waiting))
            waiting = [engine for engine, healthy in zip(waiting, health, strict=True) if not healthy]
            if not waiting:
                return
            if time.monotonic() > end:
                raise EngineError(f"no healthy server at {', '.join(e.url for e in waiting)} within {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def recover_lost(self) -> tuple[str, ...]:
        """Check the lost engines and quarantine those that are healthy again. Return their URLs."""
        self.engines = [engine for engine in self.engines if not engine.retired]
        lost = [engine for engine in self.engines if not engine.live]
        health = await asyncio.gather(*(check_health(self._http, engine, timeout_s=_RECOVER_S) for engine in lost))
        back = [engine for engine, healthy in zip(lost, health, strict=True) if healthy]
        for engine in back:
            engine.quarantined_because, engine.lost_because = f"lost before ({engine.lost_because})", ""
            engine.version, engine.offloaded, engine.dead = 0, False, asyncio.Event()
        return tuple(engine.url for engine in back)

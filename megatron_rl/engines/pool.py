"""Engine pool: the trainer's client of the generation servers, over SGLang's HTTP contract.

All requests run in one asyncio loop on a thread of the pool. `ask` is only for coroutines in this loop; `run` and
`start` put coroutines into it. All other methods are synchronous. A server that stops answering is lost, and its
requests are redone on the other servers. Every request gets exactly one answer.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from megatron_rl.engines.control import Controls, refusal_error
from megatron_rl.engines.health import HEALTH_S, MISSES, check_health, is_alive, log_unexpected_end, resume_paused
from megatron_rl.engines.patient_transport import PatientTransport
from megatron_rl.engines.pooled_engine import Dropped, EngineState, PooledEngine, Unanswered, cancel_if_lost, together
from megatron_rl.engines.router import Router, router_lost
from megatron_rl.errors import EngineError, UserError
from megatron_rl.protocol.generation import (
    GenerationRequest,
    Sample,
    SamplingParams,
    error_message,
    generate_body,
    read_samples,
    to_json,
)
from megatron_rl.supervise import raise_file_limit

T = TypeVar("T")
__all__ = ["EnginePool", "GenerationInterrupted", "GenerationRequest", "Sample", "SamplingParams", "together"]
_log = logging.getLogger(__name__)

_RETRIES = 4
_BACKOFF_S = 0.1  # doubled at every retry
_RECOVER_S = 2.5  # time for the health check of a lost engine, made at every weight update
_WATCH_S = 5.0  # between health checks of servers with unfinished requests
_IN_FLIGHT = 256  # requests per server at once
_QUARANTINE_S = 30.0  # time a request waits while every live engine is quarantined
_OTHER_FILES = 256  # open files that are not requests: health checks, weight updates, logs, checkpoints
_SMALL_ANSWER = 1 << 15  # bytes of an answer that is read in the loop itself
_JSON = {"content-type": "application/json"}
_THREADS = 32  # for `asyncio.to_thread` in the pool's loop: tools and verifiers mostly wait for processes


class GenerationInterrupted(KeyboardInterrupt):
    """Error of `run` and `generate` after `EnginePool.interrupt`. The engines got abort requests."""


class _Cancelled(Exception):
    """GenerationInterrupted inside the loop. A KeyboardInterrupt there would end the asyncio loop itself."""


class EnginePool(Controls):
    """Generation over several servers, and control of each. Use it as a context manager or call `close`."""

    def __init__(self, urls: Sequence[str], timeout_s: float = 600.0, router_url: str | None = None) -> None:
        """Start the pool's loop. The servers must run already.

        Args:
            urls: base URLs of the servers; at least one.
            timeout_s: limit in seconds for one generation request and for one weight update.
            router_url: an sglang-router through which all generation goes. If the router is lost, nothing is generated.
                None: requests go to the servers directly.
        """
        if not urls:
            raise UserError("rollout.urls is empty: an engine pool needs at least one server")
        self._engines = [PooledEngine(url.rstrip("/")) for url in dict.fromkeys(urls)]
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="engine-pool"))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="engine-answers")
        self._gate = asyncio.Semaphore(max(1, min(_IN_FLIGHT * len(self._engines), raise_file_limit() - _OTHER_FILES)))
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-pool", daemon=True)
        self._thread.start()
        # Idle connections cost more than new ones: httpx walks all pairs of them, and a server may close them first.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        # trust_env=False: requests to the engines must not go through an HTTP proxy of the site.
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=HEALTH_S),
            transport=PatientTransport(limits=limits),
            trust_env=False,
        )
        self._router = Router(router_url, self._http) if router_url else None
        self._front = PooledEngine(router_url) if router_url else None  # the router, to which requests are sent
        self._calls: set[asyncio.Task[Any]] = set()
        self._interrupted: set[asyncio.Task[Any]] = set()
        asyncio.run_coroutine_threadsafe(self._watch(), self._loop).add_done_callback(log_unexpected_end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the servers keep running. Idempotent."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._reader.shutdown()
        self._loop.close()

    async def _wind_up(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._http.aclose()
        await self._loop.shutdown_default_executor()

    @property
    def live_urls(self) -> tuple[str, ...]:
        """URLs of the engines that are not lost."""
        return tuple(engine.url for engine in self._engines if engine.live)

    @property
    def quarantined(self) -> dict[str, str]:
        """Engines that get no new request until a weight update succeeds, with the reason."""
        quarantined = (engine for engine in self._engines if engine.state is EngineState.QUARANTINED)
        return {engine.url: engine.quarantined_because for engine in quarantined}

    @property
    def lost(self) -> dict[str, str]:
        """Engines that are not used any more, with the reason."""
        return {engine.url: engine.lost_because for engine in self._engines if not engine.live}

    # Generation --------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        """Return the n samples of every request, in the order of the requests.

        Raises:
            UserError: if two requests have the same id.
            EngineError: if a server refuses a request or no server is left. Requests that are still running are aborted
                at the engines.
            GenerationInterrupted: after `interrupt`. The requests are aborted at the engines, as above.
        """
        rids = [request.rid for request in requests]
        if len(set(rids)) != len(rids):
            raise UserError(f"generation request ids must differ; '{max(rids, key=rids.count)}' is given twice")
        if not requests:
            return []
        return self.run(together([self.ask(request) for request in requests]))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that awaits `ask` in the pool's loop. Return its result.

        Raises GenerationInterrupted after `interrupt`.
        """
        try:
            return self._run(self._interruptible(work))
        except _Cancelled:
            raise GenerationInterrupted("generation was interrupted") from None

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the pool's loop; return at once. `interrupt` does not affect it; `close` cancels it."""
        self._check_open(work)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def interrupt(self) -> None:
        """Make a running `run` or `generate` raise GenerationInterrupted. Any thread or signal handler may call it."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel_calls)

    def _cancel_calls(self) -> None:
        self._interrupted |= self._calls
        for task in self._calls:
            task.cancel()

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        me = asyncio.current_task()
        assert me is not None
        self._calls.add(me)
        try:
            return await work
        except asyncio.CancelledError:
            if me in self._interrupted:
                raise _Cancelled from None
            raise
        finally:
            self._calls.discard(me)
            self._interrupted.discard(me)

    async def ask(self, request: GenerationRequest) -> list[Sample]:
        """Return the n samples of one request. Call it only in the pool's loop.

        The request is redone on any live server until one answers. If the call is canceled, the engine is asked to
        abort the request. Raises EngineError if a server refuses the request or no server is left.
        """
        async with self._gate:
            failures = attempts = 0
            while True:
                engine = await self._routable()
                attempts += 1
                try:
                    return await self._attempt(engine, request, attempts - 1)
                except Dropped:
                    continue
                except Unanswered as error:
                    failures += 1
                    await self._suspect(engine, str(error))
                    if engine.live and failures > _RETRIES:
                        raise EngineError(
                            f"{engine.url} failed request '{request.rid}' {failures} times: {error}"
                        ) from error
                    await asyncio.sleep(_BACKOFF_S * 2 ** min(failures, 6) if engine.live else 0)

    async def _routable(self) -> PooledEngine:
        """Return the router or the least loaded routable engine. Wait while every live engine is quarantined."""
        end = time.monotonic() + _QUARANTINE_S
        while True:
            live = [engine for engine in self._engines if engine.live]
            if not live:
                reasons = "; ".join(f"{url}: {reason}" for url, reason in self.lost.items())
                raise EngineError(f"no engine is left ({reasons}): start them again and resume the run")
            routed = [engine for engine in live if engine.routable]
            if routed:
                return await self._through_router(routed) or min(routed, key=lambda engine: engine.load)
            if any(engine.paused for engine in live):  # a weight update is in progress
                end = time.monotonic() + _QUARANTINE_S
            if time.monotonic() > end:
                reasons = "; ".join(f"{engine.url}: {engine.quarantined_because}" for engine in live)
                mend = "the next weight update brings them back; a run that ends here can be resumed"
                raise EngineError(f"no engine serves the committed weights ({reasons}): {mend}")
            await asyncio.sleep(_BACKOFF_S)

    async def _through_router(self, routed: Sequence[PooledEngine]) -> PooledEngine | None:
        """Let the router send requests to exactly these engines and return it. Return None if there is no router."""
        if self._router is None or self._front is None:
            return None
        if not self._front.live:
            raise EngineError(router_lost(self._front.url, self._front.lost_because))
        await self._router.route_to(engine.url for engine in routed)
        self._front.version = min(engine.version for engine in routed)
        return self._front

    async def _attempt(self, engine: PooledEngine, request: GenerationRequest, attempt: int) -> list[Sample]:
        # The server may still be aborting the first attempt, so a retry needs its own request id.
        rid = f"{request.rid}~{attempt}" if attempt else request.rid
        body, expected = to_json(generate_body(request, rid)), engine.version
        engine.load += request.n
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await cancel_if_lost(engine.dead, self._post(engine.url, "/generate", body))
        except TimeoutError:
            await self._abort(engine, rid)
            late = f"no answer to request '{request.rid}' within {self._timeout_s:g} s (rollout.timeout_s)"
            if engine is not self._front:  # behind a router, a server hangs; `_suspect` finds it
                self._drop(engine, late)
            raise Unanswered(late) from None
        except Dropped:  # the connection is closed, so no abort request is needed
            raise
        except (asyncio.CancelledError, Unanswered):
            await self._abort(engine, rid)
            raise
        finally:
            engine.load -= request.n
        samples = await self._read(engine.url, request, answer)
        oldest = min((int(v.min()) for sample in samples if len(v := sample.columns["versions"])), default=expected)
        if oldest < expected:
            engine.quarantined_because = (
                f"it answered with weight version {oldest} after version {expected}: it was restarted"
            )
            _log.warning("engine %s is %s: %s", engine.url, engine.state, engine.quarantined_because)
            raise Unanswered(engine.quarantined_because)
        return samples

    async def _abort(self, engine: PooledEngine, rid: str) -> None:
        """Send the engine an abort request; do not wait long, because closing the connection has the same effect."""
        for url in self.live_urls if engine is self._front else (engine.url,) if engine.live else ():
            with suppress(httpx.HTTPError):
                await self._http.post(f"{url}/abort_request", json={"rid": rid}, timeout=2.0)

    async def _suspect(self, engine: PooledEngine, what: str) -> None:
        """Check a server after an error. If it is not healthy, it is lost."""
        if engine.live and not await is_alive(self._http, engine):
            self._drop(engine, what)
        elif engine is self._front:
            await self._drop_dead("/health")  # the router reports that a server failed, but not which one

    async def _watch(self) -> None:
        """Mark servers as lost that have unfinished requests and miss several health checks.

        This is needed because a failed node closes no connection.
        """
        misses: dict[str, int] = {}
        while True:
            await asyncio.sleep(_WATCH_S)
            front = [self._front] if self._front is not None else []
            through = any(engine.load for engine in front)
            busy = [engine for engine in [*front, *self._engines] if engine.live and (engine.load or through)]
            try:
                health = await asyncio.gather(*(check_health(self._http, engine) for engine in busy))
            except EngineError as error:  # this machine could not open a connection: no engine is to blame
                _log.warning("servers were not checked: %s", error)
                continue
            missed = [engine for engine, healthy in zip(busy, health, strict=True) if not healthy]
            misses = {engine.url: misses.get(engine.url, 0) + 1 for engine in missed}
            for engine in missed:
                if misses[engine.url] == MISSES:
                    self._drop(engine, f"{MISSES} health checks in a row failed")

    def _drop(self, engine: PooledEngine, reason: str) -> None:
        if engine.live:
            engine.lost_because = reason or "dropped"
            engine.dead.set()
            _log.warning("engine %s is %s: %s", engine.url, engine.state, engine.lost_because)
            if self._front is not None and self._front.live and engine is not self._front:
                # The router does not report which requests this engine has, so all requests in the router are redone.
                self._front.dead.set()
                self._front.dead = asyncio.Event()

    async def _post(self, url: str, path: str, body: bytes) -> bytes:
        """Return the body of the response. Raises EngineError for a refusal (4xx), Unanswered if a retry may help."""
        try:
            response = await self._http.post(f"{url}{path}", content=body, headers=_JSON)
        except httpx.HTTPError as error:
            raise Unanswered(f"{type(error).__name__} {error}".strip()) from error
        if 400 <= response.status_code < 500:
            raise refusal_error(url, path, response)
        if response.status_code != 200:
            raise Unanswered(f"status {response.status_code}: {error_message(response)}")
        return response.content

    async def _read(self, url: str, request: GenerationRequest, content: bytes) -> list[Sample]:
        """Return the samples of an answer. A large one is read in a thread, so that the loop stays responsive.

        In one thread: several would spend as much time waiting for each other's interpreter lock as reading.
        """
        if len(content) < _SMALL_ANSWER:
            return read_samples(url, request, content)
        return await self._loop.run_in_executor(self._reader, read_samples, url, request, content)

    # Control -----------------------------------------------------------------------------------------------

    def wait_healthy(self, timeout_s: float, *, wake: bool = False) -> None:
        """Wait until every live server answers /health. Raises EngineError naming those that do not within `timeout_s`.

        `wake` also resumes servers that are paused: a trainer that was killed during a weight update leaves them
        paused.
        """
        self._run(self._wait_healthy(timeout_s, wake))

    async def _wait_healthy(self, timeout_s: float, wake: bool) -> None:
        end = time.monotonic() + timeout_s
        waiting = [engine for engine in self._engines if engine.live]
        while True:
            if wake:
                await asyncio.gather(*(resume_paused(self._http, engine) for engine in waiting))
            health = await asyncio.gather(*(check_health(self._http, engine) for engine in waiting))
            waiting = [engine for engine, healthy in zip(waiting, health, strict=True) if not healthy]
            if not waiting:
                return
            if time.monotonic() > end:
                raise EngineError(f"no healthy server at {', '.join(e.url for e in waiting)} within {timeout_s:g} s")
            await asyncio.sleep(0.1)

    def drop_dead(self) -> None:
        """Mark every live server that does not answer as lost. This does not check that the others can generate."""
        self._run(self._drop_dead("/model_info"))  # SGLang's /health would add a second to every weight update

    async def _drop_dead(self, path: str) -> None:
        live = [engine for engine in self._engines if engine.live]
        health = await asyncio.gather(*(is_alive(self._http, engine, path) for engine in live))
        for engine, healthy in zip(live, health, strict=True):
            if not healthy:
                self._drop(engine, "it does not answer")

    def drop(self, url: str, reason: str) -> None:
        """Mark an engine as lost: no request is sent to it any more."""
        self._run(self._dropped(self._find(url), reason))

    async def _dropped(self, engine: PooledEngine, reason: str) -> None:
        self._drop(engine, reason)

    def pause(self, url: str, mode: str) -> None:
        """Mark an engine as paused, then pause it. `mode` is that of `Controls.pause`."""
        self._run(self._set(self._find(url), paused=True))
        super().pause(url, mode)

    def resume(self, url: str) -> None:
        """Resume generation, then mark the engine as not paused."""
        super().resume(url)
        self._run(self._set(self._find(url), paused=False))

    def release_memory(self, url: str) -> None:
        """Release the memory of an idle engine, then mark it as offloaded."""
        super().release_memory(url)
        self._run(self._set(self._find(url), offloaded=True))

    def resume_memory(self, url: str) -> None:
        """Let an engine allocate its memory again, then mark it as not offloaded."""
        super().resume_memory(url)
        self._run(self._set(self._find(url), offloaded=False))

    def quarantine(self, url: str, reason: str) -> None:
        """Send no new request to this engine until `admit`. It finishes the requests that it is generating."""
        self._run(self._set(self._find(url), quarantined_because=reason))

    def admit(self, url: str, version: int) -> None:
        """Allow requests to an engine that serves `version`. An older version in a sample shows a restarted engine."""
        self._run(self._set(self._find(url), quarantined_because="", version=version))

    def recover_lost(self) -> tuple[str, ...]:
        """Check the lost engines and quarantine those that are healthy again. Return their URLs."""
        return self._run(self._recover_lost())

    async def _set(self, engine: PooledEngine, **values: Any) -> None:
        for name, value in values.items():
            setattr(engine, name, value)

    async def _recover_lost(self) -> tuple[str, ...]:
        lost = [engine for engine in self._engines if not engine.live]
        health = await asyncio.gather(*(check_health(self._http, engine, timeout_s=_RECOVER_S) for engine in lost))
        back = [engine for engine, healthy in zip(lost, health, strict=True) if healthy]
        for engine in back:
            engine.quarantined_because, engine.lost_because = f"lost before ({engine.lost_because})", ""
            engine.version, engine.offloaded, engine.dead = 0, False, asyncio.Event()
        return tuple(engine.url for engine in back)

    def _base_url(self, url: str) -> str:
        return self._find(url).url

    def _find(self, url: str) -> PooledEngine:
        for engine in self._engines:
            if engine.url == url.rstrip("/"):
                return engine
        raise EngineError(f"{url} is not an engine of this pool: {', '.join(e.url for e in self._engines)}")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        self._check_open(work)
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # A KeyboardInterrupt is raised here, in the caller's thread. No request may keep running after it.
            future.cancel()
            raise

    def _check_open(self, work: Coroutine[Any, Any, Any]) -> None:
        if self._loop.is_closed():
            work.close()
            raise EngineError("the engine pool is closed")

"""The trainer's side of the engines: one synchronous pool over SGLang's HTTP contract.

All requests run in one asyncio loop on a thread of the pool's own. A server that stops answering is dropped and
its requests are redone on the others; every request appears in the result exactly once.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from megatron_rl.errors import EngineError, UserError
from megatron_rl.rollout.wire import GenerationRequest, Sample, SamplingParams, error_message, generate_body, read_samples

T = TypeVar("T")
__all__ = ["EnginePool", "GenerationInterrupted", "GenerationRequest", "Sample", "SamplingParams"]
_log = logging.getLogger(__name__)

_RETRIES = 4
_BACKOFF_S = 0.1  # doubled at every retry
_HEALTH_S = 5.0  # time a server has for /health
_WATCH_S = 5.0  # between looks at servers that owe answers
_MISSES = 3  # failed looks in a row that drop a server
_IN_FLIGHT = 256  # requests per server at once


class GenerationInterrupted(KeyboardInterrupt):
    """`EnginePool.interrupt` was called while `generate` ran; the engines were asked to abort its requests."""


@dataclass(eq=False)
class _Engine:
    url: str
    load: int = 0  # samples owed
    reason: str = ""  # why it was dropped
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def live(self) -> bool:
        return not self.reason


class _Cancelled(Exception):
    """GenerationInterrupted inside the loop: asyncio lets a KeyboardInterrupt end the loop itself."""


class _Unanswered(Exception):
    """A request got no answer, or a server error; it can be redone."""


class EnginePool:
    """Generation over several servers, and control of each. Use as a context manager or call `close`.

    timeout_s bounds one generation request and one weight update.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float = 600.0) -> None:
        if not urls:
            raise UserError("rollout.urls is empty: an engine pool needs at least one server")
        self._engines = [_Engine(url.rstrip("/")) for url in dict.fromkeys(urls)]
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-pool", daemon=True)
        self._thread.start()
        # Idle connections cost more than new ones: httpx walks all pairs of them, and a server may close them first.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        # trust_env=False: an HTTP proxy of the site must not come between the trainer and its engines.
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(timeout_s, connect=_HEALTH_S), limits=limits, trust_env=False)
        self._calls: set[asyncio.Task[Any]] = set()
        self._interrupted: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; servers live on. Idempotent."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._http.aclose()

    @property
    def live_urls(self) -> tuple[str, ...]:
        return tuple(engine.url for engine in self._engines if engine.live)

    @property
    def lost(self) -> dict[str, str]:
        """Engines that are not used any more, and why."""
        return {engine.url: engine.reason for engine in self._engines if not engine.live}

    # Generation --------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        """The n samples of every request, in the order of the requests.

        Raises EngineError when a server refuses a request or no server is left, GenerationInterrupted after
        `interrupt`; either way the engines are asked to abort what was still running.
        """
        rids = [request.rid for request in requests]
        if len(set(rids)) != len(rids):
            raise UserError(f"generation request ids must differ; '{max(rids, key=rids.count)}' is given twice")
        if not requests:
            return []
        try:
            return self._run(self._generate(requests))
        except _Cancelled:
            raise GenerationInterrupted("generation was interrupted") from None

    def interrupt(self) -> None:
        """Make a running `generate` raise GenerationInterrupted; from any thread or a signal handler. Idle: no effect."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel_calls)

    def _cancel_calls(self) -> None:
        self._interrupted |= self._calls
        for task in self._calls:
            task.cancel()

    async def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]:
        me = asyncio.current_task()
        assert me is not None
        self._calls.add(me)
        gate = asyncio.Semaphore(_IN_FLIGHT * len(self._engines))
        watch = asyncio.create_task(self._watch())
        tasks = [asyncio.create_task(self._answered(request, gate)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        except asyncio.CancelledError:
            if me in self._interrupted:
                raise _Cancelled from None
            raise
        finally:
            self._calls.discard(me)
            self._interrupted.discard(me)
            for task in (watch, *tasks):
                task.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)

    async def _answered(self, request: GenerationRequest, gate: asyncio.Semaphore) -> list[Sample]:
        """One request, redone on whatever server is live until one answers."""
        async with gate:
            failures = 0
            while True:
                engine = self._least_loaded()
                try:
                    return await self._ask(engine, request, failures)
                except _Unanswered as error:
                    failures += 1
                    await self._suspect(engine, str(error))
                    if engine.live and failures > _RETRIES:
                        raise EngineError(f"{engine.url} failed request '{request.rid}' {failures} times: {error}") from error
                    await asyncio.sleep(_BACKOFF_S * 2 ** min(failures, 6) if engine.live else 0)

    def _least_loaded(self) -> _Engine:
        live = [engine for engine in self._engines if engine.live]
        if not live:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.lost.items())
            raise EngineError(f"no engine is left ({reasons}): start them again and resume the run")
        return min(live, key=lambda engine: engine.load)

    async def _ask(self, engine: _Engine, request: GenerationRequest, attempt: int) -> list[Sample]:
        # A server may still be ending the first attempt: a second one needs its own name there.
        rid = f"{request.rid}~{attempt}" if attempt else request.rid
        body = generate_body(request, rid)
        engine.load += request.n
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await _unless(engine.dead, self._post(engine.url, "/generate", body))
        except TimeoutError:
            await self._abort(engine, rid)
            self._drop(engine, f"no answer to request '{request.rid}' within {self._timeout_s:g} s (rollout.timeout_s)")
            raise _Unanswered("time-out") from None
        except asyncio.CancelledError:
            await self._abort(engine, rid)
            raise
        finally:
            engine.load -= request.n
        return read_samples(engine.url, request, answer)

    async def _abort(self, engine: _Engine, rid: str) -> None:
        """Ask for an end, briefly: closing the connection, which follows, says the same."""
        if engine.live:
            with suppress(httpx.HTTPError):
                await self._http.post(f"{engine.url}/abort_request", json={"rid": rid}, timeout=2.0)

    async def _suspect(self, engine: _Engine, what: str) -> None:
        """After an error: a server that is not healthy either is dropped."""
        if engine.live and not await self._healthy(engine.url):
            self._drop(engine, what)

    async def _watch(self) -> None:
        """Drop servers that owe answers and miss several health checks: a lost node closes no connection."""
        misses: dict[str, int] = {}
        while True:
            await asyncio.sleep(_WATCH_S)
            busy = [engine for engine in self._engines if engine.live and engine.load]
            health = await asyncio.gather(*(self._healthy(engine.url) for engine in busy))
            for engine, healthy in zip(busy, health, strict=True):
                misses[engine.url] = 0 if healthy else misses.get(engine.url, 0) + 1
                if misses[engine.url] >= _MISSES:
                    self._drop(engine, f"{_MISSES} health checks in a row failed")

    async def _healthy(self, url: str) -> bool:
        try:
            return (await self._http.get(f"{url}/health", timeout=_HEALTH_S)).status_code == 200
        except httpx.HTTPError:
            return False

    def _drop(self, engine: _Engine, reason: str) -> None:
        if engine.live:
            engine.reason = reason or "dropped"
            engine.dead.set()
            _log.warning("engine %s is not used any more: %s", engine.url, engine.reason)

    async def _post(self, url: str, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer. EngineError for a refusal (4xx), _Unanswered for everything that may be redone."""
        try:
            response = await self._http.post(f"{url}{path}", json=body)
        except httpx.HTTPError as error:
            raise _Unanswered(f"{type(error).__name__} {error}".strip()) from error
        if 400 <= response.status_code < 500:
            raise _refusal(url, path, response)
        if response.status_code != 200:
            raise _Unanswered(f"status {response.status_code}: {error_message(response)}")
        try:
            return response.json()
        except ValueError as error:
            raise EngineError(f"{url}{path} did not answer in JSON: {response.text[:200]!r}") from error

    # Control -----------------------------------------------------------------------------------------------

    def wait_healthy(self, timeout_s: float) -> None:
        """Until every live server answers /health; EngineError naming those that do not in time."""
        self._run(self._wait_healthy(timeout_s))

    async def _wait_healthy(self, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        waiting = list(self.live_urls)
        while waiting:
            health = await asyncio.gather(*(self._healthy(url) for url in waiting))
            waiting = [url for url, healthy in zip(waiting, health, strict=True) if not healthy]
            if waiting and time.monotonic() > end:
                raise EngineError(f"no healthy server at {', '.join(waiting)} within {timeout_s:g} s")
            await asyncio.sleep(0.1 if waiting else 0)

    def drop_dead(self) -> None:
        """Drop every live server that does not answer /health."""
        self._run(self._drop_dead())

    async def _drop_dead(self) -> None:
        live = [engine for engine in self._engines if engine.live]
        health = await asyncio.gather(*(self._healthy(engine.url) for engine in live))
        for engine, healthy in zip(live, health, strict=True):
            if not healthy:
                self._drop(engine, "it does not answer /health")

    def pause(self, url: str, mode: str) -> None:
        """mode: "abort" ends requests, "retract" requeues them, "in_place" keeps them with their cache."""
        self._control(url, "/pause_generation", {"mode": mode})

    def resume(self, url: str) -> None:
        self._control(url, "/continue_generation", {})

    def flush(self, url: str) -> None:
        self._control(url, "/flush_cache", {})

    def release_memory(self, url: str) -> None:
        """Have an idle server give the memory of weights and cache back; it generates nothing until it has new weights."""
        self._control(url, "/release_memory_occupation", {})

    def resume_memory(self, url: str) -> None:
        """Have the server take its memory again; its weights are undefined until the next update."""
        self._control(url, "/resume_memory_occupation", {})

    def update_weights_from_disk(self, url: str, folder: Path, version: int) -> None:
        """Serve the weights in `folder` as `version`; EngineError with the server's words when it refuses."""
        body = {"model_path": str(Path(folder).absolute()), "weight_version": str(version)}
        self._control(url, "/update_weights_from_disk", body)

    def weight_version(self, url: str) -> str:
        """As the server names it; "default" for weights as SGLang loaded them."""
        return str(_field(self._run(self._controlled(url, "GET", "/model_info", None)), "weight_version", url))

    def info(self, url: str) -> dict[str, Any]:
        """What the server says of itself: /model_info, and /server_info where the former does not name the precision."""
        answer = dict(self._run(self._controlled(url, "GET", "/model_info", None)))
        return answer if "dtype" in answer else {**self._run(self._controlled(url, "GET", "/server_info", None)), **answer}

    def memory(self, url: str) -> str | None:
        """Of the weights: "held", "released", or "empty" (taken back, nothing in it yet); None where a server does not say."""
        answer = self._run(self._controlled(url, "GET", "/model_info", None))
        return answer.get("memory") if isinstance(answer, dict) else None

    def holds_weights(self, url: str) -> bool:
        """False for a server that says its memory was given back; True where a server does not say."""
        return self.memory(url) in ("held", None)

    def checksums(self, url: str) -> dict[str, str]:
        """Digest of every tensor the server holds, as it received it."""
        return dict(_field(self._control(url, "/weights_checker", {"action": "checksum"}), "checksums", url))

    def save_weights(self, url: str, folder: Path) -> None:
        """Have an embedded server write what it holds to `model.safetensors` in `folder`; EngineError where it cannot."""
        self._control(url, "/save_weights", {"path": str(Path(folder).absolute())})

    def drop(self, url: str, reason: str) -> None:
        """Route nothing to this server any more."""
        self._run(self._dropped(self._find(url), reason))

    async def _dropped(self, engine: _Engine, reason: str) -> None:
        self._drop(engine, reason)

    def _find(self, url: str) -> _Engine:
        for engine in self._engines:
            if engine.url == url.rstrip("/"):
                return engine
        raise EngineError(f"{url} is not an engine of this pool: {', '.join(e.url for e in self._engines)}")

    def _control(self, url: str, path: str, body: dict[str, Any]) -> Any:
        answer = self._run(self._controlled(url, "POST", path, body))
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineError(f"{url}{path} failed: {answer.get('message', answer)}")
        return answer

    async def _controlled(self, url: str, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """A control request; all of them may be repeated, so a lost connection is retried."""
        url = self._find(url).url
        for attempt in range(_RETRIES):
            try:
                response = await self._http.request(method, f"{url}{path}", json=body)
                break
            except httpx.TransportError as error:
                if attempt + 1 == _RETRIES or isinstance(error, httpx.ReadTimeout):  # slow work is not asked for twice
                    raise EngineError(f"{url}{path} does not answer: {type(error).__name__} {error}".strip()) from error
                await asyncio.sleep(_BACKOFF_S * 2**attempt)
        if response.status_code != 200:
            raise _refusal(url, path, response)
        try:
            return response.json()
        except ValueError:
            return {}  # SGLang answers some controls in plain text

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise EngineError("the engine pool is closed")
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # A KeyboardInterrupt lands here, in the caller's thread: do not leave requests behind.
            future.cancel()
            raise


def _refusal(url: str, path: str, response: httpx.Response) -> EngineError:
    if response.status_code != 404:
        return EngineError(f"{url}{path} refused the request ({response.status_code}): {error_message(response)}")
    able = "" if path == "/save_weights" else ", or an SGLang of a version that has it"
    return EngineError(f"{url} has no {path} (404): name a server of `megatron-rl serve`{able} in rollout.urls")


def _field(answer: Any, name: str, url: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise EngineError(f"{url} does not name its '{name}': {str(answer)[:200]}")
    return answer[name]


async def _unless(dead: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """`work`, given up with _Unanswered once `dead` is set."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(dead.wait())
    racing: set[asyncio.Future[Any]] = {task, gone}
    try:
        await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Unanswered("the server was dropped")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)

"""Engine pool: the trainer's client of the generation servers, over SGLang's HTTP contract.

All requests run in one asyncio loop on a thread of the pool. `sample` is only for coroutines in this loop; `run` and
`start` put coroutines into it. All other methods are synchronous. A server that stops responding is lost, and its
requests are redone on the other servers, as is a request whose response is wrong. Every request gets exactly one
result.
"""

import asyncio
import logging
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from megatron_rl.engines.control import refusal_error
from megatron_rl.engines.health import HEALTH_S, log_unexpected_end
from megatron_rl.engines.http_call import Patience, ResponseTooLarge, call, put_off_error, says_later
from megatron_rl.engines.members import Members
from megatron_rl.engines.patient_transport import PatientTransport
from megatron_rl.engines.pooled_engine import (
    EngineLost,
    PooledEngine,
    PutOff,
    RequestFailed,
    cancel_if_lost,
    together,
)
from megatron_rl.engines.registry import Registry
from megatron_rl.engines.roster import Roster
from megatron_rl.errors import EngineError, UserError
from megatron_rl.protocol.api_key import key_headers
from megatron_rl.protocol.generation import (
    GenerationRequest,
    Sample,
    SamplingParams,
    error_message,
    generate_body,
    to_json,
)
from megatron_rl.protocol.responses import WrongResponse, max_response_bytes, read_samples
from megatron_rl.supervise import raise_file_limit

T = TypeVar("T")
__all__ = ["EnginePool", "GenerationInterrupted", "GenerationRequest", "Sample", "SamplingParams", "together"]
_log = logging.getLogger(__name__)

_RETRIES = 4
_BACKOFF_S = 0.1  # doubled at every retry
_WRONG_RESPONSES = 3  # to one request, before that is an error
_IN_FLIGHT = 256  # requests per server at once
_OTHER_FILES = 256  # open files that are not requests: health checks, weight updates, logs, checkpoints
_SMALL = 1 << 15  # bytes of a response that is read in the loop itself
_PATH = "/generate"
_HEADERS = {"content-type": "application/json"}
_THREADS = 32  # for `asyncio.to_thread` in the pool's loop: tools and verifiers mostly wait for processes


class GenerationInterrupted(KeyboardInterrupt):
    """Error of `run` and `generate` after `EnginePool.interrupt`. The engines got abort requests."""


class _Cancelled(Exception):
    """GenerationInterrupted inside the loop. A KeyboardInterrupt there would end the asyncio loop itself."""


class _Wrong:
    """The engines that gave wrong responses to one request."""

    def __init__(self) -> None:
        self.engines: list[PooledEngine] = []

    def add(self, engine: PooledEngine, error: WrongResponse) -> None:
        """Record a wrong response. Raise an EngineError after `_WRONG_RESPONSES` of them."""
        self.engines.append(engine)
        if len(self.engines) >= _WRONG_RESPONSES:
            raise EngineError(f"{error} (response {len(self.engines)} of as many that were wrong)") from error
        _log.warning("%s: the request is redone", error)


class EnginePool(Members):
    """Generation over several servers, and control of each. Use it as a context manager or call `close`."""

    def __init__(
        self,
        urls: Sequence[str],
        timeout_s: float = 600.0,
        router_url: str | None = None,
        vocab_size: int | None = None,
        api_key: str | None = None,
        registry: Registry | None = None,
    ) -> None:
        """Start the pool's loop. The servers must run already.

        Args:
            urls: base URLs of the servers; at least one.
            timeout_s: limit in seconds for one generation request and for one weight update.
            router_url: an sglang-router through which all generation goes. If the router is lost, nothing is generated.
                None: requests go to the servers directly.
            vocab_size: number of tokens of the model; a response with another token is wrong. None: not checked.
            api_key: key that the servers want; None: they want none.
            registry: where engines that come later register; None: there are only these.
        """
        if not urls:
            raise UserError("rollout.urls is empty: an engine pool needs at least one server")
        self._timeout_s, self._vocab_size, self.api_key = timeout_s, vocab_size, api_key
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="engine-pool"))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="engine-responses")
        most = raise_file_limit() - _OTHER_FILES
        in_flight = most if registry is not None else min(_IN_FLIGHT * len(set(urls)), most)
        self._gate = asyncio.Semaphore(max(1, in_flight))
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-pool", daemon=True)
        self._thread.start()
        # Idle connections cost more than new ones: httpx walks all pairs of them, and a server may close them first.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        # trust_env=False: requests to the engines must not go through an HTTP proxy of the site.
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=HEALTH_S),
            transport=PatientTransport(limits=limits),
            trust_env=False,
            headers=key_headers(api_key),
        )
        self._roster = Roster(urls, self._http, router_url)
        self._calls: set[asyncio.Task[Any]] = set()
        self._interrupted: set[asyncio.Task[Any]] = set()
        asyncio.run_coroutine_threadsafe(self._roster.watch(), self._loop).add_done_callback(log_unexpected_end)
        if registry is not None:
            self.start(registry.watch(self._roster)).add_done_callback(log_unexpected_end)
            self.more_may_come = lambda: True

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
        return self.run(together([self.sample(request) for request in requests]))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that awaits `sample` in the pool's loop. Return its result.

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

    async def sample(self, request: GenerationRequest) -> list[Sample]:
        """Return the n samples of one request. Call it only in the pool's loop.

        The request is redone on any live server until one gives a right response. If the call is canceled, the engine
        is asked to abort the request. Raises EngineError if a server refuses the request, if its responses stay wrong,
        or if no server is left.
        """
        async with self._gate:
            failures = attempts = 0
            later, wrong = Patience(self._timeout_s), _Wrong()
            while True:
                engine = await self._roster.choose(wrong.engines)
                attempts += 1
                try:
                    return await self._attempt(engine, request, attempts - 1)
                except EngineLost:
                    continue
                except PutOff as put_off:
                    if not await later.wait(put_off.response):
                        raise put_off_error(engine.url, _PATH, put_off.response, later.limit_s) from None
                except WrongResponse as error:
                    wrong.add(engine, error)
                except RequestFailed as error:
                    failures += 1
                    await self._roster.check_after_failure(engine, str(error))
                    if engine.live and failures > _RETRIES:
                        raise EngineError(
                            f"{engine.url} failed request '{request.rid}' {failures} times: {error}"
                        ) from error
                    await asyncio.sleep(_BACKOFF_S * 2 ** min(failures, 6) if engine.live else 0)

    async def _attempt(self, engine: PooledEngine, request: GenerationRequest, attempt: int) -> list[Sample]:
        # The server may still be aborting the first attempt, so a retry needs its own request id.
        rid = f"{request.rid}~{attempt}" if attempt else request.rid
        body, expected = to_json(generate_body(request, rid)), engine.version
        engine.load += request.n
        try:
            async with asyncio.timeout(self._timeout_s):
                content = await cancel_if_lost(engine.dead, self._post(engine.url, request, body))
        except TimeoutError:
            await self._abort(engine, rid)
            late = f"no response to request '{request.rid}' within {self._timeout_s:g} s (rollout.timeout_s)"
            if engine is not self._roster.front:  # behind a router, a server hangs; the check after a failure finds it
                self._roster.mark_lost(engine, late)
            raise RequestFailed(late) from None
        except EngineLost:  # the connection is closed, so no abort request is needed
            raise
        except (asyncio.CancelledError, RequestFailed, WrongResponse):
            await self._abort(engine, rid)
            raise
        finally:
            engine.load -= request.n
        samples = await self._read(engine.url, request, content, rid)
        oldest = min((int(v.min()) for sample in samples if len(v := sample.columns["versions"])), default=expected)
        if oldest < expected:
            why = f"it responded with weight version {oldest} after version {expected}: it was restarted"
            self._roster.quarantine(engine, why)
            raise RequestFailed(why)
        return samples

    async def _abort(self, engine: PooledEngine, rid: str) -> None:
        """Send the engine an abort request; do not wait long, because closing the connection has the same effect."""
        urls = self.live_urls if engine is self._roster.front else (engine.url,) if engine.live else ()
        for url in urls:
            with suppress(httpx.HTTPError, ResponseTooLarge):
                await call(self._http, "POST", f"{url}/abort_request", json={"rid": rid}, timeout=2.0)

    async def _post(self, url: str, request: GenerationRequest, body: bytes) -> bytes:
        """Send the JSON of a generation request and return the body of the response.

        Raises:
            EngineError: the server refuses the request (4xx).
            PutOff: the server wants the request later.
            WrongResponse: the response is too large or cannot be decompressed.
            RequestFailed: another error; a retry may help.
        """
        try:
            response = await call(
                self._http,
                "POST",
                f"{url}{_PATH}",
                max_bytes=max_response_bytes(request),
                content=body,
                headers=_HEADERS,
            )
        except (ResponseTooLarge, httpx.DecodingError) as error:
            raise WrongResponse(f"{url} responded to request '{request.rid}' wrongly: {error}") from error
        except httpx.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__} {error}".strip()) from error
        if says_later(response):
            raise PutOff(response)
        if 400 <= response.status_code < 500:
            raise refusal_error(url, _PATH, response)
        if response.status_code != 200:
            raise RequestFailed(f"status {response.status_code}: {error_message(response)}")
        return response.content

    async def _read(self, url: str, request: GenerationRequest, content: bytes, rid: str) -> list[Sample]:
        """Return the samples of a response. A large one is read in a thread, so that the loop stays responsive.

        In one thread: several would spend as much time waiting for each other's interpreter lock as reading.
        """
        read = partial(read_samples, url, request, content, rid, self._vocab_size)
        return read() if len(content) < _SMALL else await self._loop.run_in_executor(self._reader, read)

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

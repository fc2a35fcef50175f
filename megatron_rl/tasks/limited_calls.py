"""Calls of the user's own code with a time limit: in a thread one after the other, or together in an event loop.

Threads are daemons: one that never returns neither delays other calls nor the end of the process.
"""

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from megatron_rl.plugins import raised_place


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a call has no result, as the second half of a sentence whose subject is the code that was called."""

    reason: str


def raised(error: BaseException) -> Fault:
    """Return the fault of a call that raised."""
    return Fault(f"raised {type(error).__name__}: {error} ({raised_place(error)})")


def late(limit_s: float) -> Fault:
    """Return the fault of a call that took longer than `limit_s` seconds."""
    return Fault(f"took longer than task.reward_timeout_s: {limit_s:g}")


def call_in_order(calls: Sequence[Callable[[], Any]], limit_s: float) -> Iterator[Any]:
    """Yield the result of each call, or its Fault, in order.

    The calls run in one thread. After a call that takes too long, the rest runs in a new thread.

    Args:
        calls: functions without arguments.
        limit_s: time limit of one call, in seconds.
    """
    at = 0
    while at < len(calls):
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        abandoned = threading.Event()
        threading.Thread(target=_call_all, args=(calls[at:], results, abandoned), daemon=True).start()
        try:
            while at < len(calls):
                result = results.get(timeout=limit_s)
                at += 1
                yield result
        except queue.Empty:
            at += 1
            yield late(limit_s)
        finally:
            abandoned.set()


def _call_all(
    calls: Sequence[Callable[[], Any]], results: "queue.SimpleQueue[Any]", abandoned: threading.Event
) -> None:
    for call in calls:
        if abandoned.is_set():
            return
        try:
            results.put(call())
        except BaseException as error:  # noqa: BLE001  a thread boundary, and the user's code may raise anything
            results.put(raised(error))


class CallLoop:
    """An event loop in a thread of its own, for calls of async functions.

    The loop starts with the first call. If code blocks it, it is abandoned, and the next call starts another one.

    Args:
        limit_s: time limit of one call, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def call_together(self, calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
        """Return the result of each call, or its Fault, in order. The calls run at the same time."""
        loop = self._running()
        work = asyncio.run_coroutine_threadsafe(self._gather(calls), loop)
        try:
            # Every call ends in time by itself, unless code that does not await keeps the loop from running.
            return work.result(2 * self._limit_s)
        except FutureTimeout:
            work.cancel()
            self._abandon(loop)
            return [late(self._limit_s)] * len(calls)

    def close(self) -> None:
        """End the loop."""
        if self._loop is not None:
            self._abandon(self._loop)

    async def _gather(self, calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
        return list(await asyncio.gather(*map(self._call, calls)))

    async def _call(self, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            async with asyncio.timeout(self._limit_s) as limit:
                return await call()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001  a thread boundary, and the user's code may raise anything
            return late(self._limit_s) if limit.expired() else raised(error)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(self._loop,), daemon=True).start()
            return self._loop

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._loop is not loop:
                return  # another group noticed it first
            self._loop = None
        loop.call_soon_threadsafe(loop.stop)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, and end what still runs in it."""
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.close()

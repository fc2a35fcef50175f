"""Threads of the server for calls that wait: one that hangs does not hold up the others."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """Three groups of threads, so that a call waits only for calls of its own kind.

    - quick: calls that the engine's thread does between two tokens, and reading and writing of large bodies.
    - slow: calls that wait for weights, for another process or for running requests.
    - join: joining an update group, which waits for a listener that may be mute.
    """

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(8, thread_name_prefix="quick")
        self._slow = ThreadPoolExecutor(8, thread_name_prefix="slow")
        self._join = ThreadPoolExecutor(4, thread_name_prefix="join")

    async def quick(self, work: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """Return what a quick call returns."""
        return await _run(self._quick, partial(work, *args, **more))

    async def slow(self, work: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """Return what a slow call returns."""
        return await _run(self._slow, partial(work, *args, **more))

    async def join(self, work: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """Return what a call returns that joins an update group."""
        return await _run(self._join, partial(work, *args, **more))

    def close(self) -> None:
        """Take no more calls. Those that have not begun are canceled."""
        for threads in (self._quick, self._slow, self._join):
            threads.shutdown(wait=False, cancel_futures=True)


async def _run(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)

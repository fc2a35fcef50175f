"""Work that other threads hand to the engine's thread."""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
_POLL_S = 1.0  # between checks that the thread still runs


class CallQueue:
    """Functions that the engine's thread calls between two tokens.

    Args:
        check_alive: raises EngineError if the thread does not run any more.
    """

    def __init__(self, check_alive: Callable[[], None]) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._check_alive = check_alive

    def put(self, work: Callable[[], None]) -> None:
        """Queue a function and return at once. It must not raise."""
        self._work.put(work)

    def call(self, work: Callable[[], T]) -> T:
        """Return what the function returns on the engine's thread. Its error is raised here, and ends nothing else."""
        self._check_alive()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 (the error is the caller's)
                future.set_exception(error)

        self._work.put(run)
        while True:
            with suppress(TimeoutError):
                return future.result(timeout=_POLL_S)
            if not future.done():
                self._check_alive()

    def run_queued(self, wait_s: float | None) -> None:
        """Call everything that is queued. For the engine's thread.

        Args:
            wait_s: seconds to wait for the first function; None: without limit.
        """
        with suppress(queue.Empty):
            self._work.get(block=wait_s != 0.0, timeout=wait_s)()
            while True:
                self._work.get_nowait()()

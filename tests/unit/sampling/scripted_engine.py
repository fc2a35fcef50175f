"""ScriptedPool: an engine pool without engines, whose samples are computed by a function of the request."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from megatron_rl.engines.pool import GenerationRequest, Sample
from tests.trajectories import make_sample


def sample(*tokens: int, reason: str = "stop", version: int = 1, retractions: int = 0) -> Sample:
    """Return a sample whose tokens have log-probability -0.5 x token."""
    logmu = [-0.5 * token for token in tokens]
    return make_sample(tokens, reason, retractions=retractions, logmu=logmu, versions=[version] * len(tokens))


class ScriptedPool:
    """An engine pool without engines.

    Attributes:
        answer: returns the samples of a request, and may wait.
        asked: all requests.
        cancelled: ids of the canceled requests.
    """

    def __init__(self, answer: Callable[[GenerationRequest], Awaitable[list[Sample]]]) -> None:
        self.answer = answer
        self.asked: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def sample(self, request: GenerationRequest) -> list[Sample]:
        """Return the samples of a request."""
        self.asked.append(request)
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.cancelled.append(request.rid)
            raise

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the pool's loop and return its result."""
        return self.start(work).result(timeout=10)

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine in the pool's loop and return its future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Cancel everything that runs, and stop the loop."""

        async def end() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

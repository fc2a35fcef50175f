"""One engine of the pool: its state, and functions that wait for its responses."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


class EngineState(StrEnum):
    """State of an engine: what it may be used for.

    SERVING: generates with the committed weights.
    PAUSED: generates nothing, because a weight update is in progress; requests wait at the engine.
    OFFLOADED: its memory is released while the trainer works alone.
    QUARANTINED: healthy, but gets no new request until a weight update succeeds.
    LOST: not used any more. It is checked again before each weight update.
    """

    SERVING = "serving"
    PAUSED = "paused"
    OFFLOADED = "offloaded"
    QUARANTINED = "quarantined"
    LOST = "lost"


@dataclass(eq=False)
class PooledEngine:
    """One engine of the pool.

    Attributes:
        url: base URL of the server.
        load: number of samples that it must still return.
        lost_because: why it is lost; empty while it is used.
        quarantined_because: why it gets no new request; empty while it gets some.
        paused: generation is paused for a weight update.
        offloaded: its memory is released.
        version: oldest weight version that it may report; an older one shows that it was restarted.
        retired: it has left and does not come back under this URL, so it is not checked any more.
        dead: set when it is lost, so that its requests are redone elsewhere.
    """

    url: str
    load: int = 0
    lost_because: str = ""
    quarantined_because: str = ""
    paused: bool = False
    offloaded: bool = False
    version: int = 0
    retired: bool = False
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def state(self) -> EngineState:
        """The state that decides what the engine may be used for."""
        if self.lost_because:
            return EngineState.LOST
        if self.quarantined_because:
            return EngineState.QUARANTINED
        if self.offloaded:
            return EngineState.OFFLOADED
        return EngineState.PAUSED if self.paused else EngineState.SERVING

    @property
    def live(self) -> bool:
        """Whether the engine is not lost."""
        return self.state is not EngineState.LOST

    @property
    def routable(self) -> bool:
        """Whether new requests may be sent to the engine."""
        return self.state not in (EngineState.LOST, EngineState.QUARANTINED)


class RequestFailed(Exception):
    """A request got no response, or a server error. It can be redone."""


class EngineLost(RequestFailed):
    """The request was canceled because its engine is lost, or another engine behind the same router.

    No health check is needed.
    """


class PutOff(Exception):
    """The server asks for the request again later.

    Attributes:
        response: the response that says so.
    """

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order. After the first error, cancel the others, wait for their end and raise it."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def cancel_if_lost(dead: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. Cancel it and raise EngineLost once `dead` is set."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(dead.wait())
    racing: set[asyncio.Future[Any]] = {task, gone}
    try:
        await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise EngineLost("the engine is lost")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)

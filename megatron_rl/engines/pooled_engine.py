"""What the pool knows of one engine, and how it waits for several answers."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class PooledEngine:
    url: str
    load: int = 0  # samples owed
    reason: str = ""  # why it was dropped
    paused: bool = False
    held: str = ""  # why nothing is routed to it although it lives
    version: int = 0  # the oldest weight version it may answer with: a restarted server falls back behind it
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def live(self) -> bool:
        return not self.reason


class Unanswered(Exception):
    """A request got no answer, or a server error; it can be redone."""


class Dropped(Unanswered):
    """Because the server was given up, or another one behind the same router: nobody need be suspected any more."""


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results in order; after the first error the others are cancelled, and have ended when it is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_dead(dead: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """`work`, given up with Dropped once `dead` is set."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(dead.wait())
    racing: set[asyncio.Future[Any]] = {task, gone}
    try:
        await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Dropped("the server was dropped")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)

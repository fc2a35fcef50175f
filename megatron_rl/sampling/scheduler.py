"""Keeps the engines busy while the trainer works, within the staleness allowed.

Groups of step t may begin once the engines serve version >= v(t) - max_staleness, v(t) being the version that step t trains
from; they go on across weight updates. So no token of step t was sampled by weights older than that, and with
max_staleness 0 nothing runs while the trainer does. Everything here lives in the loop of the engine pool.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from megatron_rl.engines.pool import GenerationRequest, Sample
from megatron_rl.errors import EngineError
from megatron_rl.sampling.group import Group, GroupSettings, check_prompts, named, sample_group
from megatron_rl.sampling.journal import GroupJournal
from megatron_rl.sampling.step_groups import PromptDraws, StepGroups
from megatron_rl.types import Prompt, Trajectory

T = TypeVar("T")
_ATTEMPTS = 3  # at one group, before engines that sample under other versions than they should are an error


class Pool(Protocol):
    """What a sampler needs of an EnginePool."""

    async def ask(self, request: GenerationRequest) -> list[Sample]: ...

    def run(self, work: Coroutine[Any, Any, T]) -> T: ...

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]: ...


@dataclass(frozen=True)
class Source:
    """prompt: of a draw, a pure function. rewards: one per trajectory of a prompt; called in threads, several at a time."""

    prompt: Callable[[int], Prompt]
    rewards: Callable[[Prompt, list[Trajectory]], list[float]]
    longest_prompt: int


@dataclass(frozen=True)
class Bounds:
    """wanted: groups a step trains on; asked: groups begun for it at first; replaceable: see StepGroups. steps: of the run.

    deterministic: which weights sample a group follows from the step count alone, and which draw replaces which from the
    draws: one step's groups are begun when those of the step before are there, and an update waits for all that may begin.
    """

    wanted: int
    asked: int
    replaceable: int
    max_staleness: int
    steps: int
    deterministic: bool


class Scheduler:
    """draws: what was trained on already. found: groups of an earlier life by draw, taken where they are fresh enough."""

    def __init__(
        self,
        pool: Pool,
        settings: GroupSettings,
        source: Source,
        bounds: Bounds,
        draws: PromptDraws,
        buffer: GroupJournal,
        found: dict[int, Group],
    ) -> None:
        self.pool, self.settings, self.source, self.bounds = pool, settings, source, bounds
        self.draws, self.buffer, self._found = draws, buffer, found
        self._current = self._next = self._offset = 0  # step trained, first step not taken yet; v(t) = t + offset
        self._steps: dict[int, StepGroups] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    # For the trainer's thread ------------------------------------------------------------------------------

    def take(self, step: int, version: int) -> StepGroups:
        """The groups of `step`, which trains from `version`, which the engines serve; waits for them. Those of the steps
        after it are on their way meanwhile, and afterwards.

        Raises EngineError naming the trajectories that were not sampled as they should, whatever a reward raises, and
        GenerationInterrupted when the pool is interrupted.
        """
        return self.pool.run(self._take(step, version))

    def skip(self, step: int, version: int) -> None:
        """In place of `take`, where the groups of `step` were taken in an earlier life."""
        self.pool.run(self._enter(step, version, first=step + 1))

    def settle(self) -> None:
        """Before a weight update: when deterministic, wait for every group that may begin under the old weights."""
        if self.bounds.deterministic:
            self.pool.start(self._until(self._all_settled)).result()

    # In the pool's loop ------------------------------------------------------------------------------------

    async def _take(self, step: int, version: int) -> StepGroups:
        await self._enter(step, version, first=step)
        groups = self._steps[step]
        await self._until(lambda: groups.settled)
        del self._steps[step]
        self._next = step + 1
        self.draws.spend(groups.drawn)
        return groups

    async def _enter(self, step: int, version: int, *, first: int) -> None:
        """`step` trains from `version` from now on; `first` and what follows may begin."""
        self._current, self._next, self._offset = step, first, version - step
        self._fill()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()

    @property
    def _horizon(self) -> range:
        """The steps that may begin under the weights served, but those that were taken."""
        return range(self._next, min(self._current + self.bounds.max_staleness + 1, self.bounds.steps))

    def _all_settled(self) -> bool:
        return all(step in self._steps and self._steps[step].settled for step in self._horizon)

    def _fill(self) -> None:
        """Begin every step that may."""
        for step in self._horizon:
            if step not in self._steps:
                bounds = self.bounds
                self._steps[step] = StepGroups(step, bounds.wanted, bounds.replaceable, in_waves=bounds.deterministic)
                self._begin(self._steps[step], bounds.asked)
            if self.bounds.deterministic and not self._steps[step].settled:
                return

    def _begin(self, groups: StepGroups, count: int) -> None:
        """Begin so many new draws, and those that replace them, of a step."""
        while count:
            known = []
            for draw in [self.draws.next() for _ in range(count)]:
                groups.begin(draw)
                group = self._found.pop(draw, None)
                if group is not None and not self._stale(group, groups.number):
                    known.append(group)
                    continue
                groups.dropped_stale += group is not None
                task = asyncio.get_running_loop().create_task(self._sample(groups, draw))
                self._tasks[draw] = task
                task.add_done_callback(partial(self._ended, draw))
            count = sum(groups.finish(group) for group in known)
        if groups.settled:
            self._give_up_rest(groups)

    async def _sample(self, groups: StepGroups, draw: int) -> None:
        prompt = self.source.prompt(draw)
        check_prompts([prompt], self.source.longest_prompt)
        for _ in range(_ATTEMPTS):
            first_id = draw * self.settings.samples
            group = await sample_group(self.pool.ask, prompt, self.settings, first_id=first_id, group=draw)
            stale = self._stale(group, groups.number)
            if not stale:
                break
            groups.dropped_stale += 1
        else:
            allowed = self._allowed(groups.number)
            raise EngineError(
                f"{named(stale)} were not sampled under weight version {allowed}: an engine was not updated"
            )
        group = await asyncio.to_thread(self._verify, groups.number, prompt, group)
        if not groups.settled:
            self._begin(groups, groups.finish(group))

    def _verify(self, step: int, prompt: Prompt, group: Group) -> Group:
        """In a thread: the group with its rewards, on disk."""
        rewards = self.source.rewards(prompt, group.trajectories)
        rewarded = [t.with_reward(reward) for t, reward in zip(group.trajectories, rewards, strict=True)]
        group = replace(group, trajectories=rewarded)
        self.buffer.append(step, group)
        return group

    def _stale(self, group: Group, step: int) -> list[int]:
        """Trajectories with a token that weights sampled which the step must not, or could not, have seen."""
        newest = step + self._offset
        versions = range(newest - self.bounds.max_staleness, newest + 1)
        return [t.id for t in group.trajectories if any(span.version not in versions for span in t.versions)]

    def _allowed(self, step: int) -> str:
        newest = step + self._offset
        return f"{newest}" if not self.bounds.max_staleness else f"{newest - self.bounds.max_staleness} to {newest}"

    def _give_up_rest(self, groups: StepGroups) -> None:
        for draw in groups.open:
            self._tasks[draw].cancel()
        self._fill()
        self._changed.set()

    def _ended(self, draw: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(draw, None)
        if task.cancelled() or task.exception() is None:
            return
        self._failure = self._failure or task.exception()
        for other in self._tasks.values():
            other.cancel()
        self._changed.set()

"""Scheduler: keeps the engines busy while the trainer works, within the allowed staleness.

Let v(t) be the version that step t trains from. Groups of step t may start once the engines serve a version >= v(t) -
max_staleness. They continue across weight updates. So no token of step t is sampled by older weights, and with
max_staleness 0 no group runs while the trainer works. All state belongs to the event loop of the engine pool.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from megatron_rl.engines.pool import GenerationRequest, Sample
from megatron_rl.errors import EngineError
from megatron_rl.sampling.group import Group, GroupSettings, check_prompts, sample_group, trajectory_names
from megatron_rl.sampling.journal import GroupJournal
from megatron_rl.sampling.step_groups import PromptDraws, StepGroups
from megatron_rl.tasks.reward import Score
from megatron_rl.types import Prompt, Trajectory

T = TypeVar("T")
_ATTEMPTS = 3  # attempts at one group before samples of a version that is not allowed are an error


class Pool(Protocol):
    """The part of EnginePool that a scheduler uses."""

    async def sample(self, request: GenerationRequest) -> list[Sample]:
        """Return the samples of one request. Called in the pool's loop."""
        ...

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the pool's loop and return its result."""
        ...

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the pool's loop and return its future."""
        ...


@dataclass(frozen=True)
class Source:
    """Where prompts and rewards come from.

    Attributes:
        prompt: returns the prompt of a draw; a pure function.
        rewards: returns one score per trajectory of a prompt; called in several threads at the same time.
        longest_prompt: most tokens of a prompt.
    """

    prompt: Callable[[int], Prompt]
    rewards: Callable[[Prompt, list[Trajectory]], list[Score]]
    longest_prompt: int


@dataclass(frozen=True)
class Bounds:
    """How many groups a step samples, and when they may start.

    Attributes:
        wanted: number of groups that a step trains on.
        asked: number of groups that are started for it at first.
        replaceable: see StepGroups.
        max_staleness: most versions between the one that samples a token and the one that the step trains from.
        steps: number of steps of the run.
        deterministic: the weights that sample a group depend only on the step count, and replacements depend only on
            the draws. For this, the groups of a step start when those of the previous step are complete, and a weight
            update waits for all groups that may start.
    """

    wanted: int
    asked: int
    replaceable: int
    max_staleness: int
    steps: int
    deterministic: bool


class Scheduler:
    """Samples the groups of every step, also of later steps if the staleness allows it.

    Args:
        pool: the engines.
        settings: how groups are sampled.
        source: where prompts and rewards come from.
        bounds: how many groups a step samples, and when they may start.
        draws: the draws, including those that are consumed already.
        buffer: the journal that finished groups are written to.
        found: finished groups of the previous run by draw; used if they are fresh enough.
    """

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
        self._current = self._next = self._offset = 0  # step in training, first step not taken; v(t) = t + offset
        self._steps: dict[int, StepGroups] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    # For the trainer's thread ------------------------------------------------------------------------------

    def take(self, step: int, version: int) -> StepGroups:
        """Return the groups of `step`, which trains from `version`. Waits for them.

        The engines must serve `version`. Groups of later steps are sampled at the same time, and afterwards.

        Raises:
            EngineError: trajectories were sampled under a version that is not allowed. The message names them.
            GenerationInterrupted: the pool was interrupted.
            Exception: any error that the verifier raises.
        """
        return self.pool.run(self._take(step, version))

    def skip(self, step: int, version: int) -> None:
        """Skip the groups of `step`, which the previous run took. Called in place of `take`."""
        self.pool.run(self._enter(step, version, first=step + 1))

    def settle(self) -> None:
        """Wait before a weight update, if deterministic, for every group that may start under the old weights."""
        if self.bounds.deterministic:
            self.pool.start(self._settle()).result()

    # In the pool's loop ------------------------------------------------------------------------------------

    async def _take(self, step: int, version: int) -> StepGroups:
        await self._enter(step, version, first=step)
        groups = self._steps[step]
        await self._until(lambda: groups.settled)
        del self._steps[step]
        self._next = step + 1
        self.draws.consume(groups.drawn)
        return groups

    async def _enter(self, step: int, version: int, *, first: int) -> None:
        """Set that `step` now trains from `version`, and start `first` and later steps where allowed."""
        self._current, self._next, self._offset = step, first, version - step
        self._fill()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()

    async def _settle(self) -> None:
        await self._until(self._all_settled)
        if self._failure is not None:  # the last task was the record of a group, which is not on disk
            raise self._failure

    @property
    def _horizon(self) -> range:
        """The steps that may start under the served weights, without those that were taken."""
        return range(self._next, min(self._current + self.bounds.max_staleness + 1, self.bounds.steps))

    def _all_settled(self) -> bool:
        """Return whether every group that may start is finished and on disk.

        After the update that follows, no weights could sample a group again that is not on disk.
        """
        return not self._tasks and all(step in self._steps and self._steps[step].settled for step in self._horizon)

    def _fill(self) -> None:
        """Start every step that may start."""
        for step in self._horizon:
            if step not in self._steps:
                bounds = self.bounds
                self._steps[step] = StepGroups(step, bounds.wanted, bounds.replaceable, in_waves=bounds.deterministic)
                self._begin(self._steps[step], bounds.asked)
            if self.bounds.deterministic and not self._steps[step].settled:
                return

    def _begin(self, groups: StepGroups, count: int) -> None:
        """Start `count` new draws of a step, and the draws that replace them."""
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
            self._discard_rest(groups)

    async def _sample(self, groups: StepGroups, draw: int) -> None:
        prompt = self.source.prompt(draw)
        check_prompts([prompt], self.source.longest_prompt)
        for _ in range(_ATTEMPTS):
            first_id = draw * self.settings.samples
            group = await sample_group(self.pool.sample, prompt, self.settings, first_id=first_id, group=draw)
            stale = self._stale(group, groups.number)
            if not stale:
                break
            groups.dropped_stale += 1
        else:
            allowed = self._allowed(groups.number)
            raise EngineError(
                f"{trajectory_names(stale)} were not sampled under weight version {allowed}: an engine was not updated"
            )
        group = await asyncio.to_thread(self._verify, prompt, group)
        if not groups.settled:
            self._begin(groups, groups.finish(group))
        await asyncio.to_thread(self.buffer.append, groups.number, group)  # the step need not wait for the disk

    def _verify(self, prompt: Prompt, group: Group) -> Group:
        """Return the group with its rewards. Runs in a thread."""
        scores = self.source.rewards(prompt, group.trajectories)
        return replace(
            group,
            trajectories=[t.with_reward(score.value) for t, score in zip(group.trajectories, scores, strict=True)],
            reward_metrics=tuple(score.metrics for score in scores) if any(score.metrics for score in scores) else (),
            reward_errors=sum(score.failed for score in scores),
        )

    def _stale(self, group: Group, step: int) -> list[int]:
        """Return the ids of trajectories whose tokens fall outside the step's allowed weight versions."""
        newest = step + self._offset
        allowed = range(newest - self.bounds.max_staleness, newest + 1)
        return [t.id for t in group.trajectories if any(version not in allowed for version in t.sampled_by)]

    def _allowed(self, step: int) -> str:
        newest = step + self._offset
        return f"{newest}" if not self.bounds.max_staleness else f"{newest - self.bounds.max_staleness} to {newest}"

    def _discard_rest(self, groups: StepGroups) -> None:
        for draw in groups.open:
            self._tasks[draw].cancel()
        self._fill()
        self._changed.set()

    def _ended(self, draw: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(draw, None)
        self._changed.set()
        if task.cancelled() or task.exception() is None:
            return
        self._failure = self._failure or task.exception()
        for other in self._tasks.values():
            other.cancel()

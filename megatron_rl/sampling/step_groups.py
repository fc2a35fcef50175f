"""The order of prompt draws, and the groups of one step: bookkeeping without engines or clocks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from megatron_rl.sampling.group import Group
from megatron_rl.sampling.trajectory_builder import ToolUse


class PromptDraws:
    """The draws 0, 1, 2, ..., each returned once by `next`.

    A group's number is its draw, so every trajectory id of a run is unique. A draw is consumed when it was trained on,
    discarded or replaced. All draws below `below` are consumed, and the draws in `ahead`. Draws that were returned but
    not consumed when a run ended are returned again by the next run, lowest first. No draw is skipped.
    """

    def __init__(self, below: int = 0, ahead: Iterable[int] = ()) -> None:
        self._below, self._ahead, self._next = below, set(ahead), below
        self.consume(())

    @property
    def below(self) -> int:
        """The smallest draw that is not consumed."""
        return self._below

    @property
    def num_consumed(self) -> int:
        """Number of consumed draws."""
        return self._below + len(self._ahead)

    @property
    def ahead(self) -> tuple[int, ...]:
        """The consumed draws above `below`, in ascending order."""
        return tuple(sorted(self._ahead))

    def next(self) -> int:
        """Return the next draw that is not consumed."""
        while self.is_consumed(self._next):
            self._next += 1
        self._next += 1
        return self._next - 1

    def is_consumed(self, draw: int) -> bool:
        """Return whether a draw is consumed."""
        return draw < self._below or draw in self._ahead

    def consume(self, draws: Iterable[int]) -> None:
        """Mark draws as consumed."""
        self._ahead.update(draw for draw in draws if draw >= self._below)
        while self._below in self._ahead:
            self._ahead.remove(self._below)
            self._below += 1


@dataclass
class StepGroups:
    """The groups of one step while they are sampled.

    The step trains on the `wanted` groups that finish first, in order of their draws.

    Attributes:
        number: number of the step.
        wanted: number of groups that the step trains on.
        replaceable: most groups with equal rewards that are replaced by new draws. Further ones are kept.
        in_waves: judge finished groups only when no group is open, in order of draws. Then the result does not depend
            on which group finishes first.
        open: draws that are started and not finished.
        usable: finished groups that are not replaced.
        drawn: all draws of the step.
        replaced: number of replaced groups.
        kept_equal: number of groups with equal rewards that were kept.
        dropped_stale: number of groups discarded because their weight versions are not allowed.
        resumed: sum of `Group.resumed`.
        retractions: sum of `Group.retractions`.
        reward_errors: sum of `Group.reward_errors`, replaced groups included.
    """

    number: int
    wanted: int
    replaceable: int = 0
    in_waves: bool = False
    open: set[int] = field(default_factory=set)
    usable: list[Group] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    replaced: int = 0
    kept_equal: int = 0
    dropped_stale: int = 0
    resumed: int = 0
    retractions: int = 0
    reward_errors: int = 0
    _waiting: list[Group] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """Whether the step has the groups it trains on."""
        return len(self.usable) >= self.wanted

    def begin(self, draw: int) -> None:
        """Record that a draw is started."""
        self.open.add(draw)
        self.drawn.append(draw)

    def finish(self, group: Group) -> int:
        """Add a finished group. Return how many new draws must start to replace it, or groups of its wave."""
        self.open.remove(group.number)
        self._waiting.append(group)
        if self.in_waves and self.open:
            return 0
        wave, self._waiting = sorted(self._waiting, key=lambda group: group.number), []
        return sum(self._judge(group) for group in wave)

    def _judge(self, group: Group) -> bool:
        """Count the group. Return whether it must be replaced."""
        self.resumed += group.resumed
        self.retractions += group.retractions
        self.reward_errors += group.reward_errors
        equal = len({trajectory.reward for trajectory in group.trajectories}) == 1
        if equal and self.replaced < self.replaceable:
            self.replaced += 1
            return True
        self.kept_equal += equal
        self.usable.append(group)
        return False

    def chosen(self) -> list[Group]:
        """Return the groups that are trained on, in order of draws."""
        return sorted(self.usable[: self.wanted], key=lambda group: group.number)

    def tool_use(self) -> ToolUse:
        """Return the tool use of the groups that are trained on."""
        return ToolUse.total(group.tool_use for group in self.chosen())

    def reward_metrics(self) -> dict[str, float]:
        """Return the mean of every metric of the reward, over those trajectories trained on whose reward reports it."""
        values: dict[str, list[float]] = {}
        for metrics in (metrics for group in self.chosen() for metrics in group.reward_metrics):
            for name, value in metrics.items():
                values.setdefault(name, []).append(value)
        return {name: fmean(found) for name, found in values.items()}

    def counts(self) -> dict[str, Any]:
        """Return the counts of a settled step, for the run log.

        `given_up` is the number of groups that were started beyond the need and not trained on. `given_up_share` is
        their share of all draws.
        """
        given_up = len(self.drawn) - self.replaced - self.wanted
        return {
            "given_up": given_up,
            "given_up_share": given_up / len(self.drawn),
            "replaced": self.replaced,
            "kept_equal": self.kept_equal,
            "dropped_stale": self.dropped_stale,
            "resumed": self.resumed,
            "retractions": self.retractions,
        }

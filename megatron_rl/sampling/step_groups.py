"""Which prompt is drawn next, and when a step has the groups it trains on: bookkeeping without engines or clocks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.sampling.group import Group
from megatron_rl.sampling.trajectory_builder import ToolUse


class PromptDraws:
    """Numbers 0, 1, 2, ..., each handed out once. A group's number is its draw; so every trajectory id of a run is unique.

    A draw is spent when it was trained on, given up or replaced. spent: all below `below`, and `ahead` besides. What was
    handed out and not spent when a run ended is handed out again by the next, lowest first: nothing is skipped.
    """

    def __init__(self, below: int = 0, ahead: Iterable[int] = ()) -> None:
        self._below, self._ahead, self._next = below, set(ahead), below
        self.spend(())

    @property
    def below(self) -> int:
        return self._below

    @property
    def spent(self) -> int:
        """How many are."""
        return self._below + len(self._ahead)

    @property
    def ahead(self) -> tuple[int, ...]:
        return tuple(sorted(self._ahead))

    def next(self) -> int:
        while self.is_spent(self._next):
            self._next += 1
        self._next += 1
        return self._next - 1

    def is_spent(self, draw: int) -> bool:
        return draw < self._below or draw in self._ahead

    def spend(self, draws: Iterable[int]) -> None:
        self._ahead.update(draw for draw in draws if draw >= self._below)
        while self._below in self._ahead:
            self._ahead.remove(self._below)
            self._below += 1


@dataclass
class StepGroups:
    """The groups of one step on their way. `wanted` of them will be trained on: the first to finish, in order of their draws.

    replaceable: how many groups whose rewards are all equal are replaced by new draws; further ones are taken as they are.
    in_waves: nothing depends on who finishes first: finished groups are looked at when none is open, in order of draws.
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
    _waiting: list[Group] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        return len(self.usable) >= self.wanted

    def begin(self, draw: int) -> None:
        self.open.add(draw)
        self.drawn.append(draw)

    def finish(self, group: Group) -> int:
        """Take in a finished group; answers how many new draws are to begin in its place, or in its wave's."""
        self.open.remove(group.number)
        self._waiting.append(group)
        if self.in_waves and self.open:
            return 0
        wave, self._waiting = sorted(self._waiting, key=lambda group: group.number), []
        return sum(self._judge(group) for group in wave)

    def _judge(self, group: Group) -> bool:
        """Whether the group is replaced."""
        self.resumed += group.resumed
        self.retractions += group.retractions
        equal = len({trajectory.reward for trajectory in group.trajectories}) == 1
        if equal and self.replaced < self.replaceable:
            self.replaced += 1
            return True
        self.kept_equal += equal
        self.usable.append(group)
        return False

    def chosen(self) -> list[Group]:
        return sorted(self.usable[: self.wanted], key=lambda group: group.number)

    def tool_use(self) -> ToolUse:
        """Of the groups that are trained on."""
        return ToolUse.total(group.tool_use for group in self.chosen())

    def counts(self) -> dict[str, Any]:
        """Of a settled step. given_up: drawn beyond what was needed, begun and not trained on; their share of all drawn."""
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

"""TrajectoryBuilder: one response made of several samples and the tool output between them. Tokens are not changed."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megatron_rl.protocol.generation import Sample
from megatron_rl.types import COLUMNS, Prompt, Trajectory


class Observed(Protocol):
    """What an environment returns after a turn."""

    @property
    def text(self) -> str | None:
        """The text that the model reads next; None if the response is over."""
        ...

    @property
    def void(self) -> bool:
        """Whether the turn is void."""
        ...

    @property
    def failed(self) -> bool:
        """Whether the tool that the turn called failed."""
        ...


class ToolUse(NamedTuple):
    """Counts of turns by their outcome.

    Attributes:
        calls: turns after which a tool was run.
        errors: those of them whose tool failed.
        void: void turns.
    """

    calls: int = 0
    errors: int = 0
    void: int = 0

    @classmethod
    def total(cls, parts: Iterable["ToolUse"]) -> "ToolUse":
        """Return the sum of all parts."""
        return cls(*map(sum, zip(*parts, strict=True)))


class TrajectoryBuilder:
    """Builds a Trajectory from samples and observations.

    Each sample is the continuation of everything before it.

    Attributes:
        length: number of response tokens so far.
        resumed: how often the response was resumed after an abort.
        retractions: retractions as the engines count them.
        tool_use: counts of the turns so far.
        finish_reason: that of the newest sample.
        routing: experts as in `Trajectory`; None while no sample reported them.
    """

    def __init__(self, first: Sample) -> None:
        self._parts: list[dict[str, np.ndarray]] = []  # the columns of each sample and observation
        self.length = self.resumed = self.retractions = 0
        self.tool_use = ToolUse()
        self.routing: np.ndarray | None = None
        self._unrouted = 0  # end of the newest sample whose request reported no experts
        self.add_sample(first)

    def add_sample(self, sample: Sample) -> None:
        """Append the tokens that the model generated next."""
        self._add({**sample.columns, "mask": np.ones(len(sample.tokens), np.int8)})
        self.finish_reason = sample.finish_reason
        self.retractions += sample.retractions
        if sample.routing is not None:
            self._add_routing(sample.routing)
        elif len(sample.tokens):
            self._unrouted = self.length

    def count(self, observed: Observed) -> None:
        """Count one more turn that the environment observed."""
        turn = ToolUse(calls=int(observed.text is not None), errors=int(observed.failed), void=int(observed.void))
        self.tool_use = ToolUse.total([self.tool_use, turn])

    def add_observation(self, tokens: Sequence[int]) -> None:
        """Append tokens of the environment. They are masked, and their other columns hold the fill value."""
        empty = {
            name: np.full((len(tokens), *values.shape[1:]), COLUMNS[name].fill, values.dtype)
            for name, values in self._parts[0].items()
        }
        self._add({**empty, "tokens": np.array(tokens, np.int32)})

    def leave_out(self, start: int) -> None:
        """Mask all tokens from position `start` on. It is the start of a sample or observation."""
        at = 0
        for part in self._parts:
            if at >= start:
                part["mask"] = np.zeros_like(part["mask"])
            at += len(part["mask"])

    def tokens(self, start: int = 0) -> np.ndarray:
        """Return the response tokens from position `start` on, int32."""
        return np.concatenate([part["tokens"] for part in self._parts])[start:]

    def trajectory(self, number: int, group: int, prompt: Prompt) -> Trajectory:
        """Return the trajectory.

        Args:
            number: id of the trajectory.
            group: number of its group.
            prompt: the prompt of the response.
        """
        return Trajectory(
            id=number,
            group=group,
            prompt_id=prompt.id,
            prompt_tokens=np.array(prompt.tokens, np.int32),
            columns={name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]},
            finish_reason=self.finish_reason,
            routing=self.routing,
        )

    def _add(self, part: dict[str, np.ndarray]) -> None:
        self._parts.append(part)
        self.length += len(part["tokens"])

    def _add_routing(self, routing: np.ndarray) -> None:
        """Add the experts of all tokens so far: [tokens of prompt and response - 1, L, K].

        The engine chose the experts of the tokens before the sample again, maybe with newer weights. So known experts
        are kept. Experts are unknown (-1) for tokens whose request did not report them.
        """
        known = routing[:0] if self.routing is None else self.routing
        fresh = routing[len(known) :].copy()
        if self._unrouted:
            prompt = len(routing) + 1 - self.length
            fresh[: max(prompt + self._unrouted - 1 - len(known), 0)] = -1
        self.routing = np.concatenate([known, fresh])

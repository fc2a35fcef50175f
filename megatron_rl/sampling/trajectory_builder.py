"""TrajectoryBuilder: one response made of several samples and the tool output between them. Tokens are not changed."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megatron_rl.protocol.generation import Sample
from megatron_rl.types import Prompt, TopK, Trajectory, VersionSpan


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

    Args:
        logmu: True if samples carry log-probabilities.
        topk: the K of the samples' most likely tokens; 0 if samples carry none.

    Attributes:
        tokens: response tokens so far.
        mask: 1 for trained tokens, 0 for others.
        versions: spans of the response and the weight versions that sampled them.
        resumed: how often the response was resumed after an abort.
        retractions: retractions as the engines count them.
        tool_use: counts of the turns so far.
        finish_reason: that of the newest sample.
        routing: experts as in `Trajectory`; None while no sample reported them.
    """

    def __init__(self, logmu: bool, topk: int) -> None:
        self.tokens: list[int] = []
        self.mask: list[int] = []
        self.logmu: list[float] | None = [] if logmu else None
        self.versions: list[VersionSpan] = []
        self.resumed = self.retractions = 0
        self.tool_use = ToolUse()
        self.finish_reason = "abort"
        self.routing: np.ndarray | None = None
        self._unrouted = 0  # end of the newest sample whose request reported no experts
        self._topk = [TopK(np.zeros((0, topk), np.int32), np.zeros((0, topk), np.float32))] if topk else None

    def add_sample(self, sample: Sample) -> None:
        """Append the tokens that the model generated next. Version spans are shifted to positions of the response."""
        start = len(self.tokens)
        self.tokens += sample.tokens
        self.mask += [1] * len(sample.tokens)
        if self.logmu is not None:
            assert sample.logprobs is not None
            self.logmu += sample.logprobs
        for span in sample.versions:
            self._add_span(VersionSpan(span.version, start + span.start, start + span.end))
        if self._topk is not None:
            assert sample.topk is not None
            self._topk.append(sample.topk)
        self.finish_reason = sample.finish_reason
        self.retractions += sample.retractions
        if sample.routing is not None:
            self._add_routing(sample.routing)
        elif sample.tokens:
            self._unrouted = len(self.tokens)

    def count(self, observed: Observed) -> None:
        """Count one more turn that the environment observed."""
        turn = ToolUse(calls=int(observed.text is not None), errors=int(observed.failed), void=int(observed.void))
        self.tool_use = ToolUse.total([self.tool_use, turn])

    def add_observation(self, tokens: Sequence[int]) -> None:
        """Append tokens of the environment. They are masked and have no version and log-probability 0."""
        count = len(tokens)
        self.tokens += tokens
        self.mask += [0] * count
        if self.logmu is not None:
            self.logmu += [0.0] * count
        if self._topk is not None:
            k = self._topk[0].ids.shape[1]
            self._topk.append(TopK(np.zeros((count, k), np.int32), np.zeros((count, k), np.float32)))

    def leave_out(self, start: int) -> None:
        """Mask all tokens from position `start` on."""
        self.mask[start:] = [0] * (len(self.mask) - start)

    def trajectory(self, number: int, group: int, prompt: Prompt) -> Trajectory:
        """Return the trajectory. It has a response_mask only if a token is masked.

        Args:
            number: id of the trajectory.
            group: number of its group.
            prompt: the prompt of the response.
        """
        topk = None
        if self._topk is not None:
            topk = TopK(*(np.concatenate(parts) for parts in zip(*self._topk, strict=True)))
        return Trajectory(
            id=number,
            group=group,
            prompt_id=prompt.id,
            prompt_tokens=prompt.tokens,
            response_tokens=tuple(self.tokens),
            logmu=None if self.logmu is None else tuple(self.logmu),
            finish_reason=self.finish_reason,
            versions=tuple(self.versions),
            topk=topk,
            response_mask=None if all(self.mask) else tuple(self.mask),
            routing=self.routing,
        )

    def _add_routing(self, routing: np.ndarray) -> None:
        """Add the experts of all tokens so far: [tokens of prompt and response - 1, L, K].

        The engine chose the experts of the tokens before the sample again, maybe with newer weights. So known experts
        are kept. Experts are unknown (-1) for tokens whose request did not report them.
        """
        known = routing[:0] if self.routing is None else self.routing
        fresh = routing[len(known) :].copy()
        if self._unrouted:
            prompt = len(routing) + 1 - len(self.tokens)
            fresh[: max(prompt + self._unrouted - 1 - len(known), 0)] = -1
        self.routing = np.concatenate([known, fresh])

    def _add_span(self, span: VersionSpan) -> None:
        last = self.versions[-1] if self.versions else None
        if last is not None and (last.version, last.end) == (span.version, span.start):
            self.versions[-1] = VersionSpan(last.version, last.start, span.end)
        elif span.end > span.start:
            self.versions.append(span)

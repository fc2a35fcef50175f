"""One response put together from several samples and from what tools said in between: tokens go on as they came."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megatron_rl.protocol.generation import Sample
from megatron_rl.types import Prompt, TopK, Trajectory, VersionSpan


class Observed(Protocol):
    """What an environment says after a turn: the text the model reads next or None, whether the turn is void, and whether
    what it called failed."""

    @property
    def text(self) -> str | None: ...

    @property
    def void(self) -> bool: ...

    @property
    def failed(self) -> bool: ...


class ToolUse(NamedTuple):
    """calls: turns after which something was run; errors: those of them that failed; void: void turns."""

    calls: int = 0
    errors: int = 0
    void: int = 0

    @classmethod
    def total(cls, parts: Iterable["ToolUse"]) -> "ToolUse":
        return cls(*map(sum, zip(*parts, strict=True)))


class TrajectoryBuilder:
    """Grows by samples (each the continuation of everything before it) and by observations, and becomes a Trajectory.

    logmu, topk: whether samples carry them. resumed: samples that went on after an abort. retractions: as the engines count.
    tool_use: of the turns counted so far.
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
        self._unrouted = 0  # tokens up to here were sampled by a request that told no experts
        self._topk = [TopK(np.zeros((0, topk), np.int32), np.zeros((0, topk), np.float32))] if topk else None

    def add_sample(self, sample: Sample) -> None:
        """The tokens the model wrote next; version spans are moved to positions of the response."""
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
        """One more turn that an environment has heard."""
        turn = ToolUse(calls=int(observed.text is not None), errors=int(observed.failed), void=int(observed.void))
        self.tool_use = ToolUse.total([self.tool_use, turn])

    def add_observation(self, tokens: Sequence[int]) -> None:
        """Tokens that no model wrote: masked, of no version, log-probability 0."""
        count = len(tokens)
        self.tokens += tokens
        self.mask += [0] * count
        if self.logmu is not None:
            self.logmu += [0.0] * count
        if self._topk is not None:
            k = self._topk[0].ids.shape[1]
            self._topk.append(TopK(np.zeros((count, k), np.int32), np.zeros((count, k), np.float32)))

    def leave_out(self, start: int) -> None:
        """Train on nothing from position `start` on."""
        self.mask[start:] = [0] * (len(self.mask) - start)

    def trajectory(self, number: int, group: int, prompt: Prompt) -> Trajectory:
        """With a response_mask only when something is masked."""
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
        """Take in the experts of everything so far: [tokens of prompt and response - 1, L, K].

        Those before the sample's own tokens were chosen again, maybe by newer weights: what is known of them stays, and
        where the request that sampled them did not tell, they are unknown: -1.
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

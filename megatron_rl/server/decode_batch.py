"""Jobs, their rows, and the running batch of the embedded engine."""

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch

from megatron_rl.server.kv_cache import GrowingCache
from megatron_rl.server.token_sampling import row_keys, sample_tokens, uniforms

STOP, LENGTH, BROKEN = 1, 2, 3

_COLUMNS = np.dtype(
    [
        ("last", np.int64),  # the token sampled but not yet in the cache
        ("pad", np.int64),  # unused cache columns on the left
        ("prior", np.int64),  # output tokens generated before this row joined the batch
        ("filled", np.int64),  # output tokens generated since then
        ("limit", np.int64),  # max_new_tokens
        ("key", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("top_logprobs", np.int64),  # how many of the likeliest tokens are reported at every position
        ("alive", np.bool_),
    ]
)
_LIKELY = np.dtype([("id", np.int32), ("logp", np.float32)])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the engine samples.

    Attributes:
        temperature: 0 is greedy.
        top_p: 1 is off.
        top_k: 0 or less is off.
        max_new_tokens: maximum number of tokens to generate.
        stop_token_ids: tokens that end a sample.
        seed: None: the engine draws a new one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 128
    stop_token_ids: frozenset[int] = frozenset()
    seed: int | None = None


@dataclass(eq=False, slots=True)
class SampleRow:
    """One sample of a job. `tokens` does not include the tokens that the running batch still holds."""

    job: "Job"
    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[np.ndarray] = field(default_factory=list)  # pieces of `likeliest`
    routes: list[np.ndarray] = field(default_factory=list)  # pieces of `routing`
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    span_start: int = 0
    retractions: int = 0
    finish: dict[str, Any] | None = None

    def close_span(self, version: str, end: int) -> None:
        """Record that the tokens since the last span were sampled under `version`."""
        if end > self.span_start:
            self.spans.append((version, self.span_start, end))
            self.span_start = end

    @property
    def likeliest(self) -> np.ndarray:
        """Likeliest tokens at every output position: [tokens, job.top_logprobs] of `id` int32 and `logp` float32."""
        return np.concatenate([np.zeros((0, self.job.top_logprobs), dtype=_LIKELY), *self.tops])

    @property
    def routing(self) -> np.ndarray | None:
        """Experts chosen for every token of prompt and output but the last: [tokens - 1, L, K] int16.

        None if they are not requested, or if the model has not processed all of these tokens (an aborted row).
        """
        rows = sum(map(len, self.routes))
        total = len(self.job.prompt) + len(self.tokens) - 1
        return np.concatenate(self.routes)[:total] if self.routes and rows >= total else None


@dataclass(eq=False, slots=True)
class Job:
    """A request: one prompt, n samples.

    Attributes:
        rid: id of the request.
        prompt: token ids, int64.
        n: number of samples.
        sampling: how to sample.
        keys: noise keys of the samples, [n] uint64.
        input_start: prompt position from which log-probabilities of the prompt are reported. None: they are not
            requested.
        top_logprobs: how many of the likeliest tokens to report at every output position.
        routed: report the experts chosen for every token.
        future: the future of the request's result.
        rows: the samples.
        input_logprobs: log-probabilities of the prompt, if requested.
        version: version of the weights when the last row ended.
        left: number of rows that have not ended.
        stops: the stop tokens, ascending, int64.
    """

    rid: str
    prompt: np.ndarray
    n: int
    sampling: Sampling
    keys: np.ndarray
    input_start: int | None
    top_logprobs: int = 0
    routed: bool = False
    future: "Future[Job]" = field(default_factory=Future)
    rows: list[SampleRow] = field(default_factory=list)
    input_logprobs: list[float | None] = field(default_factory=list)
    version: str = ""
    left: int = 0
    stops: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def make(
        cls,
        rid: str,
        prompt: Iterable[int],
        n: int,
        sampling: Sampling,
        seed: int,
        input_start: int | None,
        top_logprobs: int = 0,
        routed: bool = False,
    ) -> Self:
        """Return a job with its rows.

        Args:
            rid: id of the request.
            prompt: token ids.
            n: number of samples.
            sampling: how to sample.
            seed: seed of the noise keys.
            input_start: as in the attributes.
            top_logprobs: as in the attributes.
            routed: as in the attributes.
        """
        keys = row_keys(seed, np.arange(n))
        job = cls(rid, np.fromiter(prompt, dtype=np.int64), n, sampling, keys, input_start, top_logprobs, routed)
        job.rows = [SampleRow(job, index) for index in range(n)]
        job.left = n
        job.stops = np.array(sorted(sampling.stop_token_ids), dtype=np.int64)
        return job

    def end_row(self, row: SampleRow, reason: dict[str, Any]) -> bool:
        """End one of the rows. Return whether it was the last one."""
        row.finish = reason
        self.left -= 1
        return not self.left


class DecodeBatch:
    """Rows that are decoded together, as columns: numpy for bookkeeping, one tensor per layer for the cache.

    Args:
        rows: the R rows.
        cache: keys and values of the rows.
        columns: bookkeeping of the rows, a structured array [R].
        stops: stop tokens of each row, [R, K], padded with -1.
        room: number of output tokens that fit before the buffers grow.
    """

    def __init__(
        self, rows: list[SampleRow], cache: GrowingCache, columns: np.ndarray, stops: np.ndarray, room: int = 32
    ) -> None:
        self.rows = rows
        self.cache = cache
        self.columns = columns
        self.stops_RK = stops
        self.tokens_RC = np.zeros((len(rows), room), dtype=np.int64)
        self.logprobs_RC = np.zeros((len(rows), room), dtype=np.float32)
        self.likeliest_RCK = np.zeros((len(rows), room, int(columns["top_logprobs"].max(initial=0))), dtype=_LIKELY)
        self.routing_RCLK = np.zeros((len(rows), room, 0, 0), dtype=np.int16)

    @classmethod
    def start(cls, rows: list[SampleRow], pads: np.ndarray, cache: GrowingCache) -> Self:
        """Return a batch of newly prefilled rows.

        Args:
            rows: the rows.
            pads: unused cache columns of each row, [R].
            cache: keys and values of the rows.
        """
        columns = np.zeros(len(rows), dtype=_COLUMNS)
        columns["pad"], columns["alive"] = pads, True
        columns["prior"] = [len(row.tokens) for row in rows]
        columns["key"] = [row.job.keys[row.index] for row in rows]
        columns["top_logprobs"] = [row.job.top_logprobs for row in rows]
        for name, source in (("limit", "max_new_tokens"), ("temperature",) * 2, ("top_p",) * 2, ("top_k",) * 2):
            columns[name] = [getattr(row.job.sampling, source) for row in rows]
        width = max((len(row.job.stops) for row in rows), default=0)
        stops = np.full((len(rows), max(width, 1)), -1, dtype=np.int64)
        for at, row in enumerate(rows):
            stops[at, : len(row.job.stops)] = row.job.stops
        return cls(rows, cache, columns, stops)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def alive(self) -> np.ndarray:
        return self.columns["alive"]

    @property
    def lengths(self) -> np.ndarray:
        """Output tokens of each row so far, [R]."""
        return self.columns["prior"] + self.columns["filled"]

    def model_inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return one decode step's inputs: input_ids, position_ids [R, 1] and attention_mask [R, columns + 1] bool."""
        now = self.cache.length
        pads = torch.from_numpy(self.columns["pad"].copy()).to(device)
        return {
            "input_ids": torch.from_numpy(self.columns["last"].copy()).to(device)[:, None],
            "position_ids": (now - pads)[:, None],
            "attention_mask": torch.arange(now + 1, device=device) >= pads[:, None],
        }

    @property
    def routed(self) -> bool:
        """Whether any request needs the experts of its tokens."""
        return any(row.job.routed for row in self.rows)

    def note_routing(self, routing_RLK: np.ndarray) -> None:
        """Record the experts chosen for the token that each row's `model_inputs` held. Call this before `advance`."""
        widths = (self.tokens_RC.shape[1], *routing_RLK.shape[1:])
        if self.routing_RCLK.shape[1:] != widths:
            self.routing_RCLK = _padded(self.routing_RCLK, widths)
        self.routing_RCLK[np.arange(len(self)), self.columns["filled"] - 1] = routing_RLK

    def advance(self, logits_RV: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Sample one token for every row. Return the rows that ended now, and why: STOP, LENGTH or BROKEN."""
        columns = self.columns
        noise = uniforms(columns["key"], self.lengths)
        settings = (columns["temperature"], columns["top_p"], columns["top_k"])
        most_likely = self.likeliest_RCK.shape[2]
        picked, logp, likeliest = sample_tokens(logits_RV.float(), *settings, noise, most_likely)
        tokens, logprobs = picked.cpu().numpy(), logp.cpu().numpy()
        at = columns["filled"]
        if at.max(initial=0) >= self.tokens_RC.shape[1]:
            self._widen(2 * self.tokens_RC.shape[1])
        live = np.flatnonzero(columns["alive"])
        self.tokens_RC[live, at[live]] = tokens[live]
        self.logprobs_RC[live, at[live]] = logprobs[live]
        if likeliest is not None:
            logp_RK, ids_RK = (tensor.cpu().numpy() for tensor in likeliest)
            self.likeliest_RCK["logp"][live, at[live]] = logp_RK[live]
            self.likeliest_RCK["id"][live, at[live]] = ids_RK[live]
        columns["filled"][live] += 1
        columns["last"] = tokens
        reason = np.where(self.lengths >= columns["limit"], LENGTH, 0)
        reason[(tokens[:, None] == self.stops_RK).any(1)] = STOP
        reason[~np.isfinite(logprobs)] = BROKEN
        ended = live[reason[live] > 0]
        columns["alive"][ended] = False
        return ended, reason[ended]

    def collect(self, at: int) -> None:
        """Move the output of row `at` into its SampleRow."""
        filled = int(self.columns["filled"][at])
        self.rows[at].tokens += self.tokens_RC[at, :filled].tolist()
        self.rows[at].logprobs += self.logprobs_RC[at, :filled].tolist()
        wanted = int(self.columns["top_logprobs"][at])
        if wanted:
            self.rows[at].tops.append(self.likeliest_RCK[at, :filled, :wanted].copy())
        if self.rows[at].job.routed and filled > 1:  # the model has not yet processed the last token
            self.rows[at].routes.append(self.routing_RCLK[at, : filled - 1].copy())
        self.columns["prior"][at] += filled
        self.columns["filled"][at] = 0

    def compact(self, device: torch.device) -> "DecodeBatch":
        """Return the batch without the rows that ended and without the columns that no row uses."""
        keep = np.flatnonzero(self.alive)
        if len(keep) == len(self):
            return self
        columns = self.columns[keep]
        drop_left = int(columns["pad"].min())
        columns["pad"] -= drop_left
        cache = self.cache.select(torch.from_numpy(keep).to(device), drop_left)
        out = DecodeBatch([self.rows[at] for at in keep], cache, columns, self.stops_RK[keep])
        out.tokens_RC, out.logprobs_RC = self.tokens_RC[keep], self.logprobs_RC[keep]
        out.likeliest_RCK = self.likeliest_RCK[keep, :, : columns["top_logprobs"].max()]
        out.routing_RCLK = self.routing_RCLK[keep]
        return out

    def join(self, other: "DecodeBatch") -> "DecodeBatch":
        """Return a batch with the rows of both. Decoding continues with all of them."""
        mine, theirs = self.columns.copy(), other.columns.copy()
        mine["pad"] += max(other.cache.length - self.cache.length, 0)
        theirs["pad"] += max(self.cache.length - other.cache.length, 0)
        stops = _stack(self.stops_RK, other.stops_RK, fill=-1)
        out = DecodeBatch(
            self.rows + other.rows, self.cache.join(other.cache), np.concatenate([mine, theirs]), stops, room=1
        )
        out.tokens_RC = _stack(self.tokens_RC, other.tokens_RC)
        out.logprobs_RC = _stack(self.logprobs_RC, other.logprobs_RC)
        out.likeliest_RCK = _stack(self.likeliest_RCK, other.likeliest_RCK)
        out.routing_RCLK = _stack(self.routing_RCLK, other.routing_RCLK)
        return out

    def _widen(self, room: int) -> None:
        self.tokens_RC = _padded(self.tokens_RC, (room,))
        self.logprobs_RC = _padded(self.logprobs_RC, (room,))
        self.likeliest_RCK = _padded(self.likeliest_RCK, (room, self.likeliest_RCK.shape[2]))


def _stack(first: np.ndarray, second: np.ndarray, fill: int = 0) -> np.ndarray:
    widths = tuple(np.maximum(first.shape[1:], second.shape[1:]).tolist())
    return np.concatenate([_padded(first, widths, fill), _padded(second, widths, fill)])


def _padded(array: np.ndarray, widths: tuple[int, ...], fill: int = 0) -> np.ndarray:
    """Return the array with every axis but the first grown to its width."""
    out = np.full((len(array), *widths), fill, dtype=array.dtype)
    out[tuple(slice(size) for size in array.shape)] = array
    return out

"""Continuous batching, without threads: waiting rows are prefilled together and join the one running batch."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_rl.errors import EngineError
from megatron_rl.server.decode_batch import BROKEN, STOP, DecodeBatch, Job, SampleRow
from megatron_rl.server.kv_cache import GrowingCache
from megatron_rl.server.model_weights import Weights, without_values
from megatron_rl.server.routed_experts import record_experts

# Scoring a prompt needs the logits of all its positions. This is the maximum number of logits in one prefill.
_SCORED_LOGITS = 1 << 25


class Batcher:
    """Waiting groups of rows, the running batch, and the weights that both use. Only one thread uses it.

    Args:
        weights: the weights to serve.
        version: version of the weights.
        device: device of the model.
        finished: called with each job whose last row has ended.
        failed: called with each job that could not be computed, and the error.
        deterministic: every request is its own batch, which is never joined or compacted.
        max_rows: maximum number of rows decoded together.
        max_prefill_tokens: maximum number of tokens of several groups prefilled together, padding included.
    """

    def __init__(
        self,
        weights: Weights,
        version: str,
        device: torch.device,
        finished: Callable[[Job], None],
        failed: Callable[[Job, Exception], None],
        *,
        deterministic: bool,
        max_rows: int,
        max_prefill_tokens: int,
    ) -> None:
        self.weights, self.version, self.device = weights, version, device
        self.deterministic, self.max_rows, self.max_prefill_tokens = deterministic, max_rows, max_prefill_tokens
        self.waiting: deque[list[SampleRow]] = deque()
        self.running: DecodeBatch | None = None
        self._finished, self._failed = finished, failed

    def add(self, jobs: Sequence[Job]) -> None:
        self.waiting.extend(list(job.rows) for job in jobs)

    @property
    def has_room(self) -> bool:
        """Whether the first waiting group may start now."""
        if not self.waiting or self.running is None:
            return bool(self.waiting)
        return not self.deterministic and int(self.running.alive.sum()) + len(self.waiting[0]) <= self.max_rows

    def admit(self) -> None:
        """Prefill waiting groups, sample their first token, and join them to the running batch.

        If that fails, each group is tried alone, so that only the jobs that cause the error fail.
        """
        groups = self._take_groups()
        if self._try_to_join(groups) is None:
            return
        for group in groups:
            left = [row for row in group if row.finish is None]
            error = self._try_to_join([left]) if left else None
            if error is not None:
                self._failed(left[0].job, error)

    def _try_to_join(self, groups: list[list[SampleRow]]) -> Exception | None:
        """Join groups to the running batch. Return the error if that fails although the model can compute."""
        try:
            self._join(groups)
        except Exception as error:  # noqa: BLE001 (whatever one job causes must not end the others)
            self._check_model(error)
            return error
        return None

    def _check_model(self, error: Exception) -> None:
        """Raise `error` if the model cannot compute even one token: then no job can succeed."""
        try:
            self.weights.model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self.device), use_cache=False)
        except Exception:  # noqa: BLE001 (any error shows that the model is broken)
            raise error from None

    def _join(self, groups: list[list[SampleRow]]) -> None:
        rows = [row for group in groups for row in group]
        texts, text_of_row = _distinct_texts(rows)
        with record_experts(self.weights.model, any(row.job.routed for row in rows)) as choices:
            logits_UV, cache, pads = self._prefill(texts, [group[0].job for group in groups])
        routing_UTLK = choices.of(len(texts))
        for row, text in zip(rows, text_of_row.tolist(), strict=True):
            if row.job.routed and routing_UTLK is not None:
                # Routes of a retracted row were recorded under the weights that sampled its tokens: they are kept.
                known = sum(map(len, row.routes))
                row.routes.append(routing_UTLK[text, pads[text] + known :])
        going = [at for at, row in enumerate(rows) if len(row.tokens) < row.job.sampling.max_new_tokens]
        for row in rows:
            if len(row.tokens) >= row.job.sampling.max_new_tokens:
                self._finish(row, {"type": "length", "length": len(row.tokens)})
        if not going:
            return
        pick = text_of_row[going]
        chosen = torch.from_numpy(pick).to(self.device)
        if not np.array_equal(pick, np.arange(len(texts))):
            cache = cache.select(chosen)
        batch = DecodeBatch.start([rows[at] for at in going], pads[pick], cache)
        self._finish_ended(batch, *batch.advance(logits_UV[chosen]))
        if self.running is not None and batch.alive.any():
            batch = self.running.compact(self.device).join(batch.compact(self.device))
        elif self.running is not None:
            batch = self.running
        self._keep(batch)

    def decode(self) -> None:
        """Sample one token for every running row.

        If that fails, the job with the most rows fails, because it needs the most memory. The others start again from
        the tokens that they have.
        """
        batch = self.running
        assert batch is not None
        try:
            self._decode(batch)
        except Exception as error:  # noqa: BLE001 (whatever one job causes must not end the others)
            self._check_model(error)
            live = [batch.rows[at].job for at in np.flatnonzero(batch.alive).tolist()]
            largest = max(live, key=lambda job: job.left)
            batch.alive[[row.job is largest for row in batch.rows]] = False
            self.retract()
            self._failed(largest, error)

    def _decode(self, batch: DecodeBatch) -> None:
        inputs = batch.model_inputs(self.device)
        with record_experts(self.weights.model, batch.routed) as choices:
            logits_RTV = self.weights.model(**inputs, past_key_values=batch.cache, use_cache=True).logits
        routing_RTLK = choices.of(len(batch))
        if routing_RTLK is not None:
            batch.note_routing(routing_RTLK[:, 0])
        self._finish_ended(batch, *batch.advance(logits_RTV[:, -1]))
        self._keep(batch)

    def retract(self) -> None:
        """Put running rows back at the head of the queue with their generated tokens. Their cache is discarded."""
        batch, self.running = self.running, None
        if batch is None:
            return
        groups: dict[int, list[SampleRow]] = {}
        for at in np.flatnonzero(batch.alive).tolist():
            batch.collect(at)
            row = batch.rows[at]
            row.retractions += 1
            groups.setdefault(id(row.job), []).append(row)
        self.waiting.extendleft(reversed(groups.values()))

    def abort(self, rids: Collection[str] | None) -> int:
        """End the rows of these requests, or of all if `rids` is None. Return the number of requests ended."""

        def chosen(row: SampleRow) -> bool:
            return rids is None or row.job.rid in rids

        rows = [row for group in self.waiting if chosen(group[0]) for row in group]
        self.waiting = deque(group for group in self.waiting if not chosen(group[0]))
        if self.running is not None:
            batch = self.running
            for at in np.flatnonzero(batch.alive).tolist():
                if chosen(batch.rows[at]):
                    batch.collect(at)
                    batch.alive[at] = False
                    rows.append(batch.rows[at])
            self._keep(batch)
        for row in rows:
            self._finish(row, {"type": "abort", "message": "Aborted by request", "status_code": None, "err_type": None})
        return len({row.job.rid for row in rows})

    def flush(self) -> None:
        """Check that the cache is empty. There is nothing to free: no cache entry outlives its request.

        Raises:
            EngineError: while requests hold keys and values.
        """
        if self.running is not None:
            raise EngineError(
                f"the cache holds {int(self.running.alive.sum())} running samples: abort or retract them first"
            )

    def release(self) -> None:
        """Release the memory of the weights. Raise EngineError while requests run or wait."""
        if self.running is not None or self.waiting:
            raise EngineError("requests run or wait here: abort them before the memory is released")
        self.weights = replace(self.weights, model=without_values(self.weights.model), digests={})

    def swap(self, weights: Weights, version: str) -> None:
        """Serve other weights from the next token on. Running rows keep their cache."""
        if self.running is not None:
            for row, length in zip(self.running.rows, self.running.lengths.tolist(), strict=True):
                if row.finish is None:
                    row.close_span(self.version, length)
        for group in self.waiting:
            for row in group:
                row.close_span(self.version, len(row.tokens))
        self.weights, self.version = weights, version

    def _take_groups(self) -> list[list[SampleRow]]:
        """Remove waiting groups that are prefilled together from the queue, within the budget.

        Either all of these groups need log-probabilities of their prompts, or none does.
        """
        groups = [self.waiting.popleft()]
        scored = groups[0][0].job.input_start is not None
        budget = self.max_prefill_tokens
        if scored:
            budget = min(budget, _SCORED_LOGITS // self.weights.model.config.vocab_size)
        longest = _longest(groups[0])
        rows = len(groups[0]) + (0 if self.running is None else int(self.running.alive.sum()))
        while self.waiting and not self.deterministic:
            group = self.waiting[0]
            longest, rows = max(longest, _longest(group)), rows + len(group)
            alike = (group[0].job.input_start is not None) == scored
            if not alike or rows > self.max_rows or longest * (len(groups) + 1) > budget:
                break
            groups.append(self.waiting.popleft())
        return groups

    def _prefill(self, texts: list[np.ndarray], jobs: list[Job]) -> tuple[torch.Tensor, GrowingCache, np.ndarray]:
        """Run the model on the left-padded texts. Return last logits [U, V], cache, and padding [U] of each text."""
        longest = max(len(text) for text in texts)
        pads = np.array([longest - len(text) for text in texts])
        ids_UT = np.zeros((len(texts), longest), dtype=np.int64)
        for at, text in enumerate(texts):
            ids_UT[at, pads[at] :] = text
        columns = np.arange(longest)
        scored = jobs[0].input_start is not None
        cache = GrowingCache()
        logits_UTV = self.weights.model(
            input_ids=torch.from_numpy(ids_UT).to(self.device),
            attention_mask=torch.from_numpy(columns >= pads[:, None]).to(self.device),
            position_ids=torch.from_numpy(np.maximum(columns - pads[:, None], 0)).to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if scored else 1,
        ).logits
        if scored:
            _score(jobs, texts, pads, logits_UTV)
        return logits_UTV[:, -1], cache, pads

    def _keep(self, batch: DecodeBatch) -> None:
        """Continue with the batch, or with its remaining rows once a quarter of its rows has ended."""
        alive = int(batch.alive.sum())
        if not alive:
            self.running = None
        elif not self.deterministic and alive <= 0.75 * len(batch):
            self.running = batch.compact(self.device)
        else:
            self.running = batch

    def _finish_ended(self, batch: DecodeBatch, ended: np.ndarray, reasons: np.ndarray) -> None:
        for at, reason in zip(ended.tolist(), reasons.tolist(), strict=True):
            batch.collect(at)
            row = batch.rows[at]
            if reason == STOP:
                self._finish(row, {"type": "stop", "matched": row.tokens[-1]})
            elif reason == BROKEN:
                place = f"output token {len(row.tokens) - 1} under weight version '{self.version}'"
                message = f"non-finite log-probability at {place}"
                self._finish(
                    row, {"type": "abort", "message": message, "status_code": 500, "err_type": "NonFiniteLogits"}
                )
            else:
                self._finish(row, {"type": "length", "length": len(row.tokens)})

    def _finish(self, row: SampleRow, reason: dict[str, Any]) -> None:
        row.close_span(self.version, len(row.tokens))
        if row.job.end_row(row, reason):
            row.job.version = self.version
            self._finished(row.job)


def _longest(group: list[SampleRow]) -> int:
    return max(len(row.job.prompt) + len(row.tokens) for row in group)


def _distinct_texts(rows: list[SampleRow]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the token sequences to prefill, and for each row the index of the sequence it continues.

    New rows of a job share one sequence.
    """
    texts: list[np.ndarray] = []
    known: dict[int, int] = {}
    at = np.empty(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        if row.tokens:
            at[i] = len(texts)
            texts.append(np.concatenate([row.job.prompt, np.array(row.tokens, dtype=np.int64)]))
        elif id(row.job) in known:
            at[i] = known[id(row.job)]
        else:
            at[i] = known[id(row.job)] = len(texts)
            texts.append(row.job.prompt)
    return texts, at


def _score(jobs: list[Job], texts: list[np.ndarray], pads: np.ndarray, logits_UTV: torch.Tensor) -> None:
    """Compute the log-probabilities of the prompt tokens at temperature 1.

    The first one requested is None, as in SGLang.
    """
    for job in jobs:
        if job.input_logprobs:
            continue
        at = next(i for i, text in enumerate(texts) if np.array_equal(text[: len(job.prompt)], job.prompt))
        assert job.input_start is not None
        first = int(pads[at]) + job.input_start
        wanted = torch.from_numpy(job.prompt[job.input_start + 1 :]).to(logits_UTV.device)
        logp_TV = torch.log_softmax(logits_UTV[at, first : first + len(wanted)].float(), dim=-1)
        job.input_logprobs = [None, *logp_TV.gather(1, wanted[:, None])[:, 0].tolist()]

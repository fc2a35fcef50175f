"""What one step writes into the run log. Everything a plot shows is made here."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron_rl.diagnostics.mismatch import ratio_record, worst_record
from megatron_rl.policy.actor import UpdateStats
from megatron_rl.types import Batch


class Stopwatch:
    """Seconds per phase of one step: `with stopwatch("rollout"): ...`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


def step_record(
    step: int, version: int, parts: list[Batch], stats: list[UpdateStats], watch: Stopwatch, truncated: float
) -> dict[str, Any]:
    """The record of one step: flat, slash-separated keys, plain numbers; lists for the worst trajectories alone.

    parts, stats: the step's updates in order; an update's log-probabilities are those of the weights before it, with ALP
    perturbed. `mismatch/...` is the first update alone, where trainer and engine hold the same weights; the same statistics
    without that prefix (`ratio_record`), and `worst/...`, are all updates, staleness within the step included.
    """
    record: dict[str, Any] = batch_record(step, version, parts, watch, truncated)
    record |= mean_update([update_record(part, one) for part, one in zip(parts, stats, strict=True)])
    if parts[0].logmu is not None:
        pairs = [_trained_pair(p, s.logp) for p, s in zip(parts, stats, strict=True)]
        logp, logmu = (np.concatenate(column) for column in zip(*pairs, strict=True))
        record |= ratio_record(logp, logmu)
        record |= {f"mismatch/{name}": value for name, value in ratio_record(*pairs[0]).items()}
        record |= _worst(parts, logp, logmu)
    return record


def _worst(parts: list[Batch], logp: np.ndarray, logmu: np.ndarray) -> dict[str, Any]:
    """logp, logmu: of the trained tokens of all parts, one part after the other."""
    before = np.cumsum([0, *(len(part) for part in parts)])
    rows = [np.repeat(np.arange(len(p)) + first, p.lengths)[p.mask > 0] for p, first in zip(parts, before, strict=False)]
    prompts = tuple(name for part in parts for name in part.prompt_ids)
    return worst_record(logp, logmu, np.concatenate(rows), np.concatenate([part.ids for part in parts]), prompts)


def batch_record(
    step: int, version: int, parts: list[Batch], watch: Stopwatch, truncated: float
) -> dict[str, float | int | str]:
    """What a step trained on, and the time it took so far. version: the weights that sampled it."""
    rewards = np.concatenate([p.rewards for p in parts])
    tokens, trained = (int(sum(c)) for c in ([len(p.tokens) for p in parts], [p.mask.sum() for p in parts]))
    responses = np.concatenate([np.add.reduceat(p.mask, p.cu_seqlens[:-1]) for p in parts])
    total = watch.total
    return {
        "kind": "step",
        "step": step,
        "version": version,
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "pass_rate": float((rewards > 0.5).mean()),
        "response_length/mean": float(responses.mean()),
        "truncated": truncated,
        "tokens/response": trained,
        "tokens/total": tokens,
        "tokens_per_s": tokens / total,
        **{f"seconds/{phase}": seconds for phase, seconds in watch.seconds.items()},
        "seconds/total": total,
    }


def update_record(part: Batch, stats: UpdateStats) -> dict[str, float]:
    """What one update did, on rank 0. tokens: trained ones.

    `precision/gemms/<qkv, proj, fc1 or fc2>`: products of these linears that ran quantised, summed over ranks,
    per update.
    """
    trained = part.mask > 0
    assert stats.entropy is not None
    return {
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": stats.lr,
        "entropy": float(stats.entropy[trained].mean(dtype=np.float64)) if trained.any() else 0.0,
        "tokens": float(trained.sum()),
        **(stats.metrics or {}),
    }


def mean_update(updates: list[dict[str, float]]) -> dict[str, float]:
    """Their means; the entropy is a token's, the learning rate is the last one. Empty without updates."""
    if not updates:
        return {}
    everywhere = set.intersection(*(set(u) for u in updates)) - {"tokens", "lr", "entropy"}
    names = [name for name in updates[0] if name in everywhere]
    tokens = [u["tokens"] for u in updates]
    return {
        **{name: float(np.mean([u[name] for u in updates])) for name in names},
        "lr": updates[-1]["lr"],
        "entropy": float(np.average([u["entropy"] for u in updates], weights=tokens)),
    }


def _trained_pair(part: Batch, logp: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    assert logp is not None and part.logmu is not None
    return logp[part.mask > 0], part.logmu[part.mask > 0]

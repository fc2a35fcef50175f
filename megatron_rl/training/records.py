"""What one step writes into the run log. Everything a plot shows is made here."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from megatron_rl.diagnostics.mismatch import ratio_record
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
) -> dict[str, float | int | str]:
    """The record of one step: flat, slash-separated keys, plain numbers.

    parts, stats: the step's updates in order. `mismatch/...` is the first update alone, where trainer and engine
    hold the same weights; `kl/...` and `ratio/...` are all updates, staleness within the step included.
    """
    rewards = np.concatenate([p.rewards for p in parts])
    tokens, trained = (int(sum(c)) for c in ([len(p.tokens) for p in parts], [p.mask.sum() for p in parts]))
    responses = np.concatenate([np.add.reduceat(p.mask, p.cu_seqlens[:-1]) for p in parts])
    record: dict[str, float | int | str] = {
        "kind": "step",
        "step": step,
        "version": version,
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "pass_rate": float((rewards > 0.5).mean()),
        "loss": float(np.mean([s.loss for s in stats])),
        "grad_norm": float(np.mean([s.grad_norm for s in stats])),
        "lr": stats[-1].lr,
        "entropy": _trained_mean(parts, [s.entropy for s in stats]),
        "response_length/mean": float(responses.mean()),
        "truncated": truncated,
        "tokens/response": trained,
        "tokens/total": tokens,
        "tokens_per_s": tokens / watch.total,
    }
    for name in stats[0].metrics or {}:
        record[name] = float(np.mean([(s.metrics or {})[name] for s in stats]))
    if parts[0].logmu is not None:
        pairs = [_trained_pair(p, s.logp) for p, s in zip(parts, stats, strict=True)]
        logp, logmu = (np.concatenate(column) for column in zip(*pairs, strict=True))
        record |= ratio_record(logp, logmu)
        record |= {f"mismatch/{name}": value for name, value in ratio_record(*pairs[0]).items()}
    record |= {f"seconds/{phase}": seconds for phase, seconds in watch.seconds.items()}
    record["seconds/total"] = watch.total
    return record


def _trained_pair(part: Batch, logp: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    assert logp is not None and part.logmu is not None
    return logp[part.mask > 0], part.logmu[part.mask > 0]


def _trained_mean(parts: list[Batch], columns: list[np.ndarray | None]) -> float:
    values = [c[p.mask > 0] for p, c in zip(parts, columns, strict=True) if c is not None]
    return float(np.concatenate(values).mean())

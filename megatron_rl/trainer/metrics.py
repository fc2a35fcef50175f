"""Records that a step writes to the run log, and that the plots show."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron_rl.diagnostics.mismatch import ratio_record, worst_record
from megatron_rl.errors import UserError
from megatron_rl.policy.actor import UpdateStats
from megatron_rl.types import Batch


class Stopwatch:
    """Seconds per phase of one step: `with stopwatch("rollout"): ...`.

    Attributes:
        started: `time.perf_counter()` at the start of the step.
        seconds: phase -> seconds so far.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the `with` block to the phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the start of the step."""
        return time.perf_counter() - self.started


def step_record(
    step: int, version: int, parts: list[Batch], stats: list[UpdateStats], watch: Stopwatch, sampled: dict[str, float]
) -> dict[str, Any]:
    """Return the record of one step: flat, slash-separated keys and plain numbers; only `worst/...` has lists.

    `mismatch/...` covers only the first update, where trainer and engine hold the same weights unless tokens are stale.
    If tokens are stale, `mismatch_by_staleness` splits it by staleness. The same statistics without that prefix
    (`ratio_record`) and `worst/...` cover all updates, including the staleness within the step.

    Args:
        step: number of the step, from 0.
        version: version of the weights that the step started from.
        parts: batch of each update, in order.
        stats: statistics of each update, in order. Their logp are of the weights before the update, perturbed if ALP
            is enabled.
        watch: seconds of each phase of the step so far.
        sampled: `Rollouts.sampled`, the metrics of sampling.
    """
    record: dict[str, Any] = batch_record(step, version, parts, watch, sampled)
    updates = mean_update([update_record(part, one) for part, one in zip(parts, stats, strict=True)])
    if clash := sorted(record.keys() & updates.keys()):
        raise UserError(f"the objective's metrics {clash} have the names of other log keys: rename them")
    record |= updates
    if parts[0].logmu is not None:
        pairs = [_trained_pair(p, s.logp) for p, s in zip(parts, stats, strict=True)]
        logp, logmu = (np.concatenate(column) for column in zip(*pairs, strict=True))
        if not len(logp):  # every turn was void, so no token is trained
            return record
        record |= ratio_record(logp, logmu)
        record |= _worst(parts, logp, logmu)
        if len(pairs[0][0]):
            record |= {f"mismatch/{name}": value for name, value in ratio_record(*pairs[0]).items()}
            if record.get("staleness/max"):
                record |= mismatch_by_staleness(_staleness(version, parts[0]), *pairs[0])
    return record


def trajectory_k3(part: Batch, logp: np.ndarray) -> dict[int, float]:
    """Return KL(mu || pi) of each trajectory by its id, estimated by k3 in nats per trained token.

    Trajectories without a trained token are left out. Empty without logmu. `logp` [N] is the trainer's, of every token.
    """
    if part.logmu is None:
        return {}
    trained = part.mask > 0
    rows = np.repeat(np.arange(len(part)), part.lengths)[trained]
    x = logp[trained].astype(np.float64) - part.logmu[trained]
    with np.errstate(over="ignore"):
        total = np.bincount(rows, weights=np.expm1(x) - x, minlength=len(part))
    count = np.bincount(rows, minlength=len(part))
    return {int(part.ids[row]): float(total[row] / count[row]) for row in np.flatnonzero(count)}


def _worst(parts: list[Batch], logp: np.ndarray, logmu: np.ndarray) -> dict[str, Any]:
    """Return the `worst/...` record. `logp` and `logmu` hold the trained tokens of all parts, in order."""
    before = np.cumsum([0, *(len(part) for part in parts)])
    rows = [
        np.repeat(np.arange(len(p)) + first, p.lengths)[p.mask > 0] for p, first in zip(parts, before, strict=False)
    ]
    named = [part.prompt_ids for part in parts if part.prompt_ids is not None]
    prompts = tuple(str(name) for names in named for name in names)
    return worst_record(logp, logmu, np.concatenate(rows), np.concatenate([part.ids for part in parts]), prompts)


def batch_record(
    step: int, version: int, parts: list[Batch], watch: Stopwatch, sampled: dict[str, float]
) -> dict[str, float | int | str]:
    """Return statistics of a step's batch, and the seconds of the step so far.

    `staleness/mean` and `staleness/max` cover the trained tokens, in versions. `seconds/rollout` is the time that the
    trainer waited for the batch.

    Args:
        step: number of the step, from 0.
        version: version of the weights that the step started from.
        parts: batch of each update, in order.
        watch: seconds of each phase of the step so far.
        sampled: `Rollouts.sampled`, the metrics of sampling.
    """
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
        **sampled,
        **staleness_record(version, parts),
        "tokens/response": trained,
        "tokens/total": tokens,
        "tokens_per_s": tokens / total,
        **{f"seconds/{phase}": seconds for phase, seconds in watch.seconds.items()},
        "seconds/total": total,
    }


def staleness_record(version: int, parts: list[Batch]) -> dict[str, float]:
    """Return the staleness of trained tokens. Empty if the engines reported no versions or no token is trained."""
    if any(part.versions is None for part in parts):
        return {}
    stale = np.concatenate([_staleness(version, part) for part in parts])
    return {"staleness/mean": float(stale.mean()), "staleness/max": float(stale.max())} if len(stale) else {}


def _staleness(version: int, part: Batch) -> np.ndarray:
    """Return the staleness of the part's trained tokens, in versions."""
    assert part.versions is not None
    return version - part.versions[part.mask > 0]


def mismatch_by_staleness(stale: np.ndarray, logp: np.ndarray, logmu: np.ndarray) -> dict[str, float]:
    """Return `mismatch/stale_<s>/tokens`, `/k3` and `/mean_abs` of the log ratios for each staleness s.

    Args:
        stale: staleness of the trained tokens, shape [N], in versions.
        logp: logp of the trainer, shape [N].
        logmu: logp of the rollout policy, shape [N].
    """
    record: dict[str, float] = {}
    for s in np.unique(stale).tolist():
        x = logp[stale == s].astype(np.float64) - logmu[stale == s]
        with np.errstate(over="ignore"):
            k3 = np.mean(np.expm1(x) - x)
        values = {"tokens": float(len(x)), "k3": float(k3), "mean_abs": float(np.abs(x).mean())}
        record |= {f"mismatch/stale_{s}/{name}": value for name, value in values.items()}
    return record


def update_record(part: Batch, stats: UpdateStats) -> dict[str, float]:
    """Return the record of one update. For rank 0. `tokens` counts the trained tokens.

    `precision/gemms/<qkv, proj, fc1 or fc2>` is the number of products of these linears that ran quantized in the
    update, summed over ranks.
    """
    trained = part.mask > 0
    assert stats.entropy is not None
    return {
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "update/skipped": float(stats.grad_norm == 0),
        "lr": stats.lr,
        "entropy": float(stats.entropy[trained].mean(dtype=np.float64)) if trained.any() else 0.0,
        "tokens": float(trained.sum()),
        **(stats.metrics or {}),
    }


def mean_update(updates: list[dict[str, float]]) -> dict[str, float]:
    """Return the means over updates. The entropy is a mean over tokens; `lr` is the last one. Empty without updates."""
    if not updates:
        return {}
    everywhere = set.intersection(*(set(u) for u in updates)) - {"tokens", "lr", "entropy"}
    names = [name for name in updates[0] if name in everywhere]
    tokens = [u["tokens"] for u in updates]
    return {
        **{name: float(np.mean([u[name] for u in updates])) for name in names},
        "lr": updates[-1]["lr"],
        "entropy": float(np.average([u["entropy"] for u in updates], weights=tokens)) if any(tokens) else 0.0,
    }


def _trained_pair(part: Batch, logp: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    assert logp is not None and part.logmu is not None
    return logp[part.mask > 0], part.logmu[part.mask > 0]

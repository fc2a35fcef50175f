"""Whether the runs of an arm collapse, and how large their mismatch is and how it grows."""

from dataclasses import dataclass

import numpy as np

from megatron_rl.statistics.estimate import Estimate
from megatron_rl.statistics.paired import seed_difference
from megatron_rl.statistics.power_law import log_slope
from megatron_rl.statistics.survival import Survival, collapse_index, collapse_share, kaplan_meier, zero_events_bound
from megatron_rl.study.study_data import ArmRuns, CellCurve

_LEAST_EVALS = 6  # with fewer evaluations a collapse is looked for in the training reward
MISMATCH = ("mismatch_k3", "k3")


@dataclass(frozen=True)
class Stability:
    """Collapse and mismatch of the finished runs of an arm.

    Attributes:
        series: the rewards in which a collapse was looked for: `held-out` or `training`.
        collapsed: step of the collapse of each seed; NaN where it did not collapse.
        survival: share of runs that have not collapsed, by step.
        share: share of runs that collapse.
        bound: largest share that none of these runs allows; None if one collapsed.
        mismatch: geometric mean over steps and seeds of the mismatch k3, nats/token; None if it was not logged.
        growth: d ln(k3) / d ln(step); None if it was not logged.
    """

    series: str
    collapsed: np.ndarray
    survival: Survival
    share: Estimate
    bound: float | None
    mismatch: Estimate | None
    growth: Estimate | None


def measure_stability(group: ArmRuns, *, most_mismatch: float | None, confidence: float) -> Stability:
    """Find the collapses of a group and estimate its mismatch.

    Args:
        group: finished cells of an arm.
        most_mismatch: k3 above which a run counts as collapsed; None for no such limit.
        confidence: of the intervals.
    """
    series = "held-out" if len(group.steps) >= _LEAST_EVALS else "training"
    limit = np.inf if most_mismatch is None else most_mismatch
    collapsed = np.array([_collapse(curve, series, limit) for curve in group.curves])
    ends = np.array([_end(curve) for curve in group.curves])
    events = np.isfinite(collapsed)
    count, runs = int(events.sum()), len(events)
    mismatch, growth = _mismatch(group, confidence)
    return Stability(
        series,
        collapsed,
        kaplan_meier(np.where(events, collapsed, ends), events, confidence=confidence),
        collapse_share(count, runs, confidence=confidence),
        None if count else zero_events_bound(runs, confidence=confidence),
        mismatch,
        growth,
    )


def seed_mismatch(group: ArmRuns) -> np.ndarray:
    """Return ln of each seed's geometric mean mismatch, [seeds]; NaN if it was not logged or is zero."""
    means = []
    for curve in group.curves:
        values = mismatch_column(curve)
        good = np.isfinite(values) & (values > 0)
        means.append(np.log(values[good]).mean() if good.any() else np.nan)
    return np.array(means)


def mismatch_column(curve: CellCurve) -> np.ndarray:
    """Return the mismatch k3 of every step: at equal weights if that was logged, else against the rollout policy."""
    for name in MISMATCH:
        values = curve.column(name)
        if np.isfinite(values).any():
            return values
    return np.full(len(curve.log["step"]), np.nan)


def _end(curve: CellCurve) -> float:
    return float(max(curve.steps[-1], curve.log["step"].max(initial=0)))


def _collapse(curve: CellCurve, series: str, limit: float) -> float:
    """Return the step at which a run collapsed, NaN if it did not."""
    steps = curve.log["step"]
    loss = curve.log.get("loss")
    if series == "held-out":
        reward, at_steps, noise = curve.reward.mean(1), curve.steps, _evaluation_noise(curve)
    else:
        logged = np.isfinite(curve.column("reward"))
        reward, at_steps = curve.column("reward")[logged], steps[logged]
        noise = _jump_noise(reward)
    at = int(collapse_index(reward, noise=noise)) if len(reward) else -1
    found = [float(at_steps[at])] if at >= 0 else []
    broken = mismatch_column(curve) > limit
    if loss is not None:
        broken = broken | np.isinf(loss)  # NaN also stands for a step that has no loss
    if broken.any():
        found.append(float(steps[np.argmax(broken)]))
    return min(found, default=float("nan"))


def _evaluation_noise(curve: CellCurve) -> float:
    """Return the largest standard error that sampling gives the mean reward of an evaluation."""
    mean, prompts = curve.reward.mean(1), curve.reward.shape[1]
    if np.isfinite(curve.chance).all():
        return float(np.sqrt(curve.chance.mean(1).max() / prompts))
    if curve.reward.min() >= 0 and curve.reward.max() <= 1:
        return float(np.sqrt((mean * (1 - mean)).max() / prompts))  # the most that a reward in [0, 1] can vary
    return _jump_noise(mean)


def _jump_noise(reward: np.ndarray) -> float:
    """Return the standard deviation of a reward around its course, from its jumps from one value to the next."""
    jumps = np.abs(np.diff(reward))
    # 1.4826 times the median is the standard deviation of normal numbers; a jump has twice the variance of a value.
    return float(1.4826 * np.median(jumps) / np.sqrt(2)) if len(jumps) else 0.0


def _mismatch(group: ArmRuns, confidence: float) -> tuple[Estimate | None, Estimate | None]:
    levels = seed_mismatch(group)
    if not np.isfinite(levels).all():
        return None, None
    steps = np.array(sorted(set.intersection(*(set(curve.log["step"].tolist()) for curve in group.curves))))
    values = np.stack([mismatch_column(curve)[np.isin(curve.log["step"], steps)] for curve in group.curves])
    growth = log_slope(steps + 1.0, values, confidence=confidence) if len(steps) > 1 else None
    return seed_difference(levels, confidence=confidence).exponential(), growth

"""Collapse of a run as an event in time: finding it, survival curves, and what no event at all says."""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_rl.errors import UserError
from megatron_rl.statistics.estimate import Estimate

_NOISE = 3.0  # a fall below this many standard errors of a difference of two evaluations is noise


def collapse_index(
    reward: np.ndarray,
    *,
    noise: np.ndarray | float,
    lasting: int = 3,
) -> np.ndarray:
    """Return the position of the evaluation at which each run collapses, -1 where it does not.

    A run collapses at the first evaluation of `lasting` in a row whose reward is below half of the largest reward
    before, and below it by more than 3 standard errors of the difference of two evaluations, sqrt(2) * noise: half of a
    small reward is soon lost to chance, and half of a negative one means nothing. A non-finite reward is a collapse at
    once.

    Args:
        reward: rewards in the order of the evaluations, [..., n]; non-finite counts as a collapse.
        noise: standard error of one evaluation, of the shape of reward or [...] or a number.
        lasting: evaluations in a row.
    """
    reward = np.asarray(reward, dtype=np.float64)
    broken = ~np.isfinite(reward)
    best = np.maximum.accumulate(np.where(broken, -np.inf, reward), axis=-1)
    noise = np.asarray(noise, dtype=np.float64)
    noise = noise if noise.ndim == reward.ndim or noise.ndim == 0 else noise[..., None]
    fallen = (best > 0) & (reward < best / 2) & (best - reward > _NOISE * np.sqrt(2) * noise)
    n = reward.shape[-1]
    event = broken.copy()
    if n >= lasting:
        windows = np.lib.stride_tricks.sliding_window_view(fallen | broken, lasting, axis=-1).all(-1)
        event[..., : n - lasting + 1] |= windows
    return np.where(event.any(-1), np.argmax(event, axis=-1), -1)


@dataclass(frozen=True)
class Survival:
    """A Kaplan-Meier curve: share of runs that have not collapsed after each time, with pointwise intervals, [n]."""

    times: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int
    events: int
    confidence: float


def kaplan_meier(times: np.ndarray, events: np.ndarray, *, confidence: float = 0.95) -> Survival:
    """Estimate the share of runs that survive each time, from runs that collapsed and runs that ended before.

    S(t) = prod (1 - d_i / n_i) (Kaplan and Meier, JASA 53, 1958) by scipy.stats.ecdf, with Greenwood's variance and the
    log-log interval, which stays in [0, 1]. Where the curve is 1 or 0 Greenwood's variance is zero and says nothing;
    there the interval is the exact one of Clopper and Pearson with the number of runs at risk. Below about 20 runs all
    of these are rough; compare arms by `collapse_difference`.

    Args:
        times: time of the collapse, or of the end of the run, [runs].
        events: True where the run collapsed, [runs].
        confidence: of each pointwise interval.

    Raises:
        UserError: there are no runs.
    """
    times, events = np.asarray(times, dtype=np.float64), np.asarray(events, dtype=bool)
    if len(times) == 0:
        raise UserError("a survival curve needs at least one run; all cells of this arm are missing or failed")
    curve = stats.ecdf(stats.CensoredData.right_censored(times, ~events)).sf
    at, share = curve.quantiles, curve.probabilities
    n = len(times)
    if events.any():
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns where the curve is 0 or 1; see below
            interval = curve.confidence_interval(confidence_level=confidence, method="log-log")
        low, high = interval.low.probabilities.copy(), interval.high.probabilities.copy()
    else:
        low, high = np.full(len(at), np.nan), np.full(len(at), np.nan)
    risk = (times[None, :] >= at[:, None]).sum(1)
    tail = (1 - confidence) / 2
    edge_high = np.where(share >= 1, 1.0, 1 - tail ** (1 / np.maximum(n, 1)))
    edge_low = np.where(share >= 1, tail ** (1 / np.maximum(risk, 1)), 0.0)
    edge = (share >= 1) | (share <= 0) | ~np.isfinite(low) | ~np.isfinite(high)
    low, high = np.where(edge, edge_low, low), np.where(edge, edge_high, high)
    return Survival(at, share, low, high, n, int(events.sum()), confidence)


def collapse_share(events: int, runs: int, *, confidence: float = 0.95) -> Estimate:
    """Estimate the share of runs that collapse, all followed to the same step.

    The interval is the exact one of Clopper and Pearson (Biometrika 26, 1934): it covers at least its confidence for
    every share and number of runs, and is therefore wide.

    Args:
        events: runs that collapsed.
        runs: all runs; at least one.
        confidence: of the interval.
    """
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, events, runs - events + 1) if events else 0.0
    high = stats.beta.ppf(1 - tail, events + 1, runs - events) if events < runs else 1.0
    rate = events / runs
    return Estimate(rate, float("nan"), float(low), float(high), np.inf, confidence, f"exact, {runs} runs")


def zero_events_bound(runs: int, *, confidence: float = 0.95) -> float:
    """Return the largest share of collapses that is compatible with none in n runs: 1 - 0.05^(1/n), about 3 / n.

    One-sided exact bound (Hanley and Lippman-Hand, JAMA 249, 1983).
    """
    return float(1 - (1 - confidence) ** (1 / runs))


def collapse_difference(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Return the two-sided p value of Fisher's exact test that two arms collapse equally often.

    Args:
        first: collapsed runs and all runs of one arm.
        second: the same of the other.
    """
    table = [[first[0], first[1] - first[0]], [second[0], second[1] - second[0]]]
    return float(stats.fisher_exact(table).pvalue)

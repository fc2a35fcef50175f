"""Compute to the same reward, and the batch size from which a faster kernel pays for its overhead."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_rl.statistics.estimate import Estimate
from megatron_rl.statistics.paired import seed_difference


def isotonic(y: np.ndarray) -> np.ndarray:
    """Return the least-squares rising curve of every series, [..., n].

    iso_i = max over j <= i of min over k >= i of mean(y_j .. y_k), the max-min formula (Robertson, Wright, Dykstra,
    "Order restricted statistical inference", 1988, theorem 1.4.4). scipy's isotonic_regression takes one series a call.
    """
    y = np.asarray(y, dtype=np.float64)
    n = y.shape[-1]
    sums = np.concatenate([np.zeros((*y.shape[:-1], 1)), np.cumsum(y, -1)], -1)
    first, last = np.arange(n)[:, None], np.arange(n)
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / np.maximum(last - first + 1, 1)
    means = np.where(last >= first, means, np.inf)
    least = np.minimum.accumulate(means[..., ::-1], -1)[..., ::-1]
    return np.where(last >= first, least, -np.inf).max(-2)


def compute_to_reach(compute: np.ndarray, reward: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return the compute at which the rising curve of each series first reaches a level; NaN where it never does.

    Args:
        compute: ascending compute, of the shape of reward or [n].
        reward: rewards, [..., n].
        level: rewards to reach, [...].
    """
    curve, level = isotonic(reward), np.asarray(level, dtype=np.float64)[..., None]
    reached = curve >= level
    at = np.argmax(reached, axis=-1)[..., None]
    before = np.maximum(at - 1, 0)
    low, high = np.take_along_axis(curve, before, -1), np.take_along_axis(curve, at, -1)
    share = np.where(high > low, (level - low) / np.where(high > low, high - low, 1.0), 1.0)
    compute = np.broadcast_to(compute, curve.shape)
    start, end = np.take_along_axis(compute, before, -1), np.take_along_axis(compute, at, -1)
    found = start + np.clip(share, 0, 1) * (end - start)
    return np.where(reached.any(-1), found[..., 0], np.nan)


@dataclass(frozen=True)
class SpeedUp:
    """How much less compute an arm needs than the reference to reach a reward.

    Attributes:
        share: of the common range of rewards.
        level: the reward R*.
        ratio: C_reference / C_arm with its interval; NaN where a curve does not reach the level.
    """

    share: float
    level: np.ndarray
    ratio: Estimate


def speed_up(
    reference: tuple[np.ndarray, np.ndarray],
    arm: tuple[np.ndarray, np.ndarray],
    *,
    share: float = 0.8,
    confidence: float = 0.95,
) -> SpeedUp:
    """Estimate C_reference(R*) / C_arm(R*) at a share of the range of rewards that both arms cover.

    Each seed's curve is made rising by isotonic regression and interpolated linearly; nothing is fitted. The range is
    the one that all seeds of both arms cover, so that every seed reaches the level. The interval is t over the paired
    seeds' log ratios. The jackknife of the mean curves was tried and covers less, because isotonic regression is not
    smooth.

    Args:
        reference: ascending compute of the evaluations, [n] or [..., seeds, n], and rewards, [..., seeds, n].
        arm: the same of the arm, with the same seeds and the same unit of compute.
        share: of the common range.
        confidence: of the interval.
    """
    both = isotonic(np.concatenate([reference[1], arm[1]], -2))
    low, top = both[..., 0].max(-1), both[..., -1].min(-1)
    level = np.where(top > low, low + share * (top - low), np.nan)
    ratios = _log_ratio(reference, arm, level[..., None])
    return SpeedUp(share, level[()], seed_difference(ratios, confidence=confidence).exponential())


def _log_ratio(
    reference: tuple[np.ndarray, np.ndarray], arm: tuple[np.ndarray, np.ndarray], level: np.ndarray
) -> np.ndarray:
    first, second = compute_to_reach(*reference, level), compute_to_reach(*arm, level)
    positive = (first > 0) & (second > 0)
    return np.log(np.where(positive, first, np.nan)) - np.log(np.where(positive, second, np.nan))


def break_even(
    tokens: tuple[np.ndarray, np.ndarray], seconds: tuple[np.ndarray, np.ndarray], *, confidence: float = 0.95
) -> Estimate:
    """Estimate the number of tokens a step from which the second arm is faster than the first.

    Each arm's time is t = a + b n by least squares; n* = (a_2 - a_1) / (b_1 - b_2). The interval is Fieller's (J. Royal
    Statistical Society B 16, 1954) with the pooled residual variance. When the slopes cannot be told apart the interval
    is the whole line: no break-even is shown.

    Args:
        tokens: tokens of each step, for the first and the second arm, [n] each.
        seconds: seconds of each step, [..., n] each.
        confidence: of the interval.
    """
    fits = [_line(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))
            for x, y in zip(tokens, seconds, strict=True)]  # fmt: skip
    free = len(tokens[0]) + len(tokens[1]) - 4
    variance = (fits[0].sse + fits[1].sse) / max(free, 1)
    top, bottom = fits[1].intercept - fits[0].intercept, fits[0].slope - fits[1].slope
    v_top = variance * (fits[0].unit[0] + fits[1].unit[0])
    v_bottom = variance * (fits[0].unit[1] + fits[1].unit[1])
    v_both = -variance * (fits[0].unit[2] + fits[1].unit[2])
    t2 = stats.t.ppf(0.5 + confidence / 2, max(free, 1)) ** 2
    # (top - n bottom)^2 <= t^2 Var(top - n bottom): a quadratic in n.
    a, b, c = bottom**2 - t2 * v_bottom, top * bottom - t2 * v_both, top**2 - t2 * v_top
    root = b**2 - a * c
    bounded = (a > 0) & (root >= 0) & (free > 0)
    safe = np.where(bounded, a, 1.0)
    reach = np.sqrt(np.where(bounded, root, 0.0))
    low, high = np.where(bounded, (b - reach) / safe, -np.inf), np.where(bounded, (b + reach) / safe, np.inf)
    value = top / np.where(bottom == 0, np.nan, bottom)
    nan = np.full(np.shape(value), np.nan)[()]
    return Estimate(value, nan, low[()], high[()], free, confidence, "Fieller")


@dataclass(frozen=True)
class _Line:
    """Intercept, slope, sum of squares; variances of both and their covariance in units of the residual variance."""

    intercept: np.ndarray
    slope: np.ndarray
    sse: np.ndarray
    unit: tuple[float, float, float]


def _line(x: np.ndarray, y: np.ndarray) -> _Line:
    n, mean = len(x), x.mean()
    square = float(((x - mean) ** 2).sum())
    if square == 0:
        nan = np.full(y.shape[:-1], np.nan)
        return _Line(nan, nan, nan, (np.nan, np.nan, np.nan))
    slope = (y * (x - mean)).sum(-1) / square
    intercept = y.mean(-1) - slope * mean
    sse = ((y - intercept[..., None] - slope[..., None] * x) ** 2).sum(-1)
    return _Line(intercept, slope, sse, (1 / n + mean**2 / square, 1 / square, -mean / square))

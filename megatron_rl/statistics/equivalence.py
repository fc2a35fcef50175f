"""Equivalence within a margin, many comparisons at once, and how much data a claim would need."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from megatron_rl.statistics.estimate import Estimate


@dataclass(frozen=True)
class Equivalence:
    """The result of two one-sided tests.

    Attributes:
        margin: the largest difference that counts as equal, in the unit of the value.
        p: the larger of the two one-sided p values; 1 when the standard error is not known.
        interval: the estimate with its interval at confidence 1 - 2 alpha.
        alpha: the level of each test.
    """

    margin: float
    p: Any
    interval: Estimate
    alpha: float

    @property
    def equivalent(self) -> Any:
        """True where the interval lies inside the margin, which is the same as p < alpha."""
        return self.p < self.alpha


def tost(difference: Estimate, margin: float, *, alpha: float = 0.05) -> Equivalence:
    """Test whether a difference is smaller than a margin on both sides.

    Two one-sided t tests (Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987): equivalent if the interval of
    confidence 1 - 2 alpha lies inside (-margin, margin). Not equivalent means "not shown", never "different".

    Args:
        difference: estimate with standard error and degrees of freedom.
        margin: the largest difference that counts as equal; positive.
        alpha: level of each one-sided test.
    """
    known = np.isfinite(difference.se) & (np.asarray(difference.df) > 0)
    se = np.where(known & (np.asarray(difference.se) > 0), difference.se, np.finfo(float).tiny)
    df = np.where(known, difference.df, 1.0)
    below, above = (difference.value + margin) / se, (difference.value - margin) / se
    p = np.where(known, np.maximum(stats.t.sf(below, df), stats.t.cdf(above, df)), 1.0)
    return Equivalence(margin, p[()], difference.at(1 - 2 * alpha), alpha)


def difference_p(difference: Estimate) -> Any:
    """Return the two-sided p value that a difference is zero; 1 where its standard error is not known."""
    known = np.isfinite(difference.se) & (np.asarray(difference.df) > 0)
    se = np.where(known & (np.asarray(difference.se) > 0), difference.se, np.finfo(float).tiny)
    p = 2 * stats.t.sf(np.abs(difference.value) / se, np.where(known, difference.df, 1.0))
    return np.where(known, p, 1.0)[()]


def holm(p: np.ndarray) -> np.ndarray:
    """Return p values adjusted for the number of comparisons (Holm, Scandinavian J. of Statistics 6, 1979), [..., n].

    The chance of at least one false claim among all n stays below the level, whatever their dependence.
    """
    p = np.asarray(p, dtype=np.float64)
    n = p.shape[-1]
    order = np.argsort(p, axis=-1)
    scaled = np.take_along_axis(p, order, -1) * np.arange(n, 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0)
    return np.take_along_axis(adjusted, np.argsort(order, axis=-1), -1)


def detectable_seed_difference(sd: float, seeds: int, *, power: float = 0.8, confidence: float = 0.95) -> float:
    """Return the smallest true difference that a t test over seeds finds with this power; inf for one seed.

    Args:
        sd: standard deviation over seeds of the paired difference.
        seeds: number of seeds.
        power: chance to find the difference.
        confidence: of the two-sided test.
    """
    if seeds < 2:
        return float("inf")
    df = seeds - 1
    reach = stats.t.ppf(0.5 + confidence / 2, df)
    low, high = 0.0, 2 * (reach + 10)
    for _ in range(60):
        middle = (low + high) / 2
        found = stats.nct.sf(reach, df, middle) + stats.nct.cdf(-reach, df, middle)
        low, high = (middle, high) if found < power else (low, middle)
    return float(high * sd / np.sqrt(seeds))


def equivalence_power(sd: float, seeds: int, margin: float, *, alpha: float = 0.05) -> float:
    """Return the chance that TOST over seeds shows equivalence when the arms are exactly equal.

    The chance given the sample standard deviation s is max(0, 2 Phi((m - t s / sqrt(S)) / (sd / sqrt(S))) - 1); it is
    averaged over the chi-square distribution of s (Owen, Biometrika 52, 1965; here by quadrature over its quantiles).

    Args:
        sd: true standard deviation over seeds of the paired difference.
        seeds: number of seeds.
        margin: of the equivalence.
        alpha: level of each one-sided test.
    """
    if seeds < 2:
        return 0.0
    df = seeds - 1
    s = sd * np.sqrt(stats.chi2.ppf((np.arange(400) + 0.5) / 400, df) / df)
    scale = max(sd / np.sqrt(seeds), np.finfo(float).tiny)
    inside = (margin - stats.t.ppf(1 - alpha, df) * s / np.sqrt(seeds)) / scale
    return float(np.maximum(2 * stats.norm.cdf(inside) - 1, 0).mean())


def seeds_for_equivalence(sd: float, margin: float, *, alpha: float = 0.05, power: float = 0.8, most: int = 500) -> int:
    """Return the least number of seeds that would show equivalence of equal arms with this power.

    Args:
        sd: standard deviation over seeds of the paired difference.
        margin: of the equivalence.
        alpha: level of each one-sided test.
        power: chance to show equivalence.
        most: returned when even this number does not reach the power.
    """
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        enough = equivalence_power(sd, middle, margin, alpha=alpha) >= power
        low, high = (low, middle) if enough else (middle + 1, high)
    return low

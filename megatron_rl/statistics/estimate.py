"""A number with its interval: what every function of this room returns instead of a bare number."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error and its two-sided interval.

    All fields are floats, or arrays of one shape when many data sets are estimated at once.

    Attributes:
        value: the estimate.
        se: its standard error; NaN when it is not known.
        low: lower end of the interval; -inf when there is none.
        high: upper end of the interval; inf when there is none.
        df: degrees of freedom of the standard error; inf for a normal interval.
        confidence: the share of intervals that contain the truth.
        method: how the interval was made, in words for a reader.
    """

    value: Any
    se: Any
    low: Any
    high: Any
    df: Any
    confidence: float
    method: str

    def covers(self, truth: float | np.ndarray) -> Any:
        """Return where the interval contains the truth."""
        return (self.low <= truth) & (truth <= self.high)

    def excludes(self, value: float) -> Any:
        """Return where the interval lies wholly on one side of a value."""
        return (self.low > value) | (self.high < value)

    def at(self, confidence: float) -> "Estimate":
        """Return the t interval of the same value and standard error at another confidence."""
        return t_estimate(self.value, self.se, self.df, confidence=confidence, method=self.method)

    def exponential(self) -> "Estimate":
        """Return the estimate of exp(value): the standard error is dropped, the interval is not symmetric."""
        high = np.exp(np.minimum(self.high, 700.0))
        nan = np.full(np.shape(self.value), np.nan)[()]
        return Estimate(np.exp(self.value), nan, np.exp(self.low), high, self.df, self.confidence, self.method)


def t_estimate(value: Any, se: Any, df: Any, *, confidence: float = 0.95, method: str = "t") -> Estimate:
    """Return value -+ t * se. Without degrees of freedom (df < 1) the interval is the whole line.

    Args:
        value: the estimate.
        se: its standard error.
        df: degrees of freedom; inf gives the normal quantile.
        confidence: of the two-sided interval.
        method: how the standard error was made.
    """
    df = np.asarray(df, dtype=np.float64)
    known = (df > 0) & np.isfinite(se)
    reach = np.where(
        known, stats.t.ppf(0.5 + confidence / 2, np.where(known, df, 1.0)) * np.where(known, se, 0), np.inf
    )
    return Estimate(value, se, value - reach, value + reach, df[()], confidence, method)

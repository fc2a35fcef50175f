"""Power laws y = E + k x^-alpha, for example mismatch against model size, and growth along a run."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_rl.errors import UserError
from megatron_rl.statistics.estimate import Estimate
from megatron_rl.statistics.fit_curves import profile_interval
from megatron_rl.statistics.paired import seed_difference

LEAST_SIZES = 4
_EXPONENTS = np.linspace(-2.0, 3.0, 251)


@dataclass(frozen=True)
class PowerLaw:
    """A fitted power law, or the statement that there is none. Fields are numbers, or arrays over the data sets.

    Attributes:
        exponent: alpha with its profile interval; negative where y grows without bound.
        limit: E, the value at infinite x for positive alpha.
        factor: k.
        p: p value that y depends on x at all (F test against a constant).
        hold_out: root mean square error on the larger half of x when only the smaller half is fitted.
        hold_out_constant: the same error of the mean of the smaller half: what a law has to beat.
    """

    exponent: Estimate
    limit: np.ndarray
    factor: np.ndarray
    p: np.ndarray
    hold_out: np.ndarray
    hold_out_constant: np.ndarray


def fit_power_law(x: np.ndarray, y: np.ndarray, *, confidence: float = 0.95) -> PowerLaw:
    """Fit a power law by variable projection.

    For a fixed alpha, E and k are linear, so they are projected out in closed form and only alpha is searched (Golub
    and Pereyra, SIAM J. Numerical Analysis 10, 1973). The curve is written (x^-alpha - 1) / -alpha inside, which
    becomes ln x at alpha = 0. The hold-out error predicts the larger half of x from the smaller half. It is the honest
    figure of merit, because a fit with three parameters to a few sizes always looks good.

    Args:
        x: positive sizes or compute, [n], with at least four different values.
        y: values, [..., n].
        confidence: of the profile interval.

    Raises:
        UserError: fewer than four different x, or an x that is not positive.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(np.unique(x)) < LEAST_SIZES or not (x > 0).all():
        raise UserError(
            f"a power law needs at least {LEAST_SIZES} different positive sizes, but there are {len(np.unique(x))}; "
            "add sizes to the grid, or read the sizes one by one"
        )
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[..., order]
    scale = np.exp(np.log(x).mean())
    sse, limit, slope = _project(x / scale, y)
    best = np.argmin(sse, axis=-1)
    least, n = _at(sse, best), len(x)
    low, high = profile_interval(_EXPONENTS, sse, least, points=n, parameters=3, confidence=confidence)
    alpha = _EXPONENTS[best]
    # Back from slope * (z^-a - 1) / -a with z = x / scale to E + k x^-a; alpha = 0 has no such form.
    safe = np.where(alpha == 0, np.nan, alpha)
    factor = _at(slope, best) / -safe * scale**safe
    bottom = _at(limit, best) + _at(slope, best) / safe
    constant = ((y - y.mean(-1, keepdims=True)) ** 2).sum(-1)
    free = max(n - 3, 1)
    ratio = (constant - least) / 2 / np.maximum(least / free, np.finfo(float).tiny)
    p = stats.f.sf(np.maximum(ratio, 0), 2, free) if n > 3 else np.ones(np.shape(least))
    nan = np.full(np.shape(least), np.nan)[()]
    exponent = Estimate(alpha[()], nan, low[()], high[()], n - 3, confidence, "profile of the exponent")
    return PowerLaw(exponent, bottom[()], factor[()], p, *_hold_out(x / scale, y))


def log_slope(steps: np.ndarray, values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Estimate the growth d ln(value) / d ln(step) as the mean of each seed's slope, by t over seeds.

    Neighboring steps of one run are correlated, so its own regression interval would be too short. Seeds are
    independent. One seed has no interval.

    Args:
        steps: positive steps, [n].
        values: positive values, [..., seeds, n]; non-positive or non-finite ones are left out of their seed's slope.
        confidence: of the interval.
    """
    values = np.asarray(values, dtype=np.float64)
    good = np.isfinite(values) & (values > 0)
    count = np.maximum(good.sum(-1, keepdims=True), 1)
    x, y = np.broadcast_to(np.log(steps), values.shape), np.log(np.where(good, values, 1.0))
    x = np.where(good, x - np.where(good, x, 0).sum(-1, keepdims=True) / count, 0.0)
    square = (x**2).sum(-1)
    slopes = (x * y).sum(-1) / np.where(square > 0, square, np.nan)
    return seed_difference(slopes, confidence=confidence)


def _project(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sum of squares, intercept and slope on each exponent's basis, each [..., exponents]."""
    alpha = _EXPONENTS[:, None]
    flat = np.abs(alpha) < 1e-9
    basis = np.where(flat, np.log(x), -np.expm1(-alpha * np.log(x)) / np.where(flat, 1.0, alpha))
    center = basis.mean(-1, keepdims=True)
    basis = basis - center
    square = (basis**2).sum(-1)
    mean = y.mean(-1, keepdims=True)
    slope = (y - mean) @ basis.T / square
    sse = np.maximum(((y - mean) ** 2).sum(-1, keepdims=True) - slope**2 * square, 0.0)
    return sse, mean - slope * center[:, 0], slope


def _hold_out(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors on the larger half of x: of the law, NaN with fewer than four smaller x, and of their mean."""
    fitted = x <= np.median(x)
    seen, rest = y[..., fitted], y[..., ~fitted]
    plain = np.sqrt(((rest - seen.mean(-1, keepdims=True)) ** 2).mean(-1))
    if len(np.unique(x[fitted])) < LEAST_SIZES:
        return np.full(np.shape(plain), np.nan)[()], plain[()]
    sse, limit, slope = _project(x[fitted], seen)
    best = np.argmin(sse, axis=-1)
    alpha = np.asarray(_EXPONENTS[best])[..., None]
    flat = np.abs(alpha) < 1e-9
    basis = np.where(flat, np.log(x[~fitted]), -np.expm1(-alpha * np.log(x[~fitted])) / np.where(flat, 1.0, alpha))
    guess = _at(limit, best)[..., None] + _at(slope, best)[..., None] * basis
    return np.sqrt(((guess - rest) ** 2).mean(-1))[()], plain[()]


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, np.asarray(index)[..., None], -1)[..., 0]

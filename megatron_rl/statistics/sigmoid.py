"""The sigmoid of reward against compute: R(C) = R_0 + (A - R_0) / (1 + (C_mid / C)^B)."""

from dataclasses import dataclass

import numpy as np

from megatron_rl.errors import UserError
from megatron_rl.statistics.estimate import Estimate
from megatron_rl.statistics.fit_curves import Fit, levenberg, profile_interval

STEEPNESS = (0.2, 8.0)  # bounds of B
NARROW = 0.1  # an interval of the ceiling that is wider says too little
_MIDPOINTS, _STEEP = 25, 9  # the grid of first values
_Pair = tuple[np.ndarray, np.ndarray]
_Box = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class SigmoidFit:
    """A fitted curve. The fields are numbers, or arrays over the curves that were fitted together.

    Attributes:
        ceiling: A with its profile interval; its ends are infinite where the data do not bound it.
        midpoint: C_mid, the compute at half the way from R_0 to A.
        steepness: B.
        start: R_0, measured and not fitted.
        identified: the last point is past half the way, and the interval of A is narrower than 0.1.
        fit: parameters (A, ln C_mid, ln B) and sum of squares.
    """

    ceiling: Estimate
    midpoint: np.ndarray
    steepness: np.ndarray
    start: np.ndarray
    identified: np.ndarray
    fit: Fit


def fit_sigmoid(
    compute: np.ndarray,
    reward: np.ndarray,
    start: np.ndarray | float,
    *,
    se: np.ndarray | None = None,
    confidence: float = 0.95,
    most: float = 1.0,
    values: int = 17,
) -> SigmoidFit:
    """Fit the reward-compute curve of ScaleRL (Khatri et al. 2025, arXiv 2510.13786, equation 1).

    A is linear, so the first values come from a grid of C_mid and B with A solved in closed form; the iteration of
    `levenberg` ends it. The interval of A is its profile interval. "Not identified" is a result: a curve that has not
    bent yet says nothing about its ceiling.

    Args:
        compute: positive compute of each evaluation, [n]: steps, tokens or seconds; at least 5.
        reward: reward of each evaluation, [..., n].
        start: reward R_0 before training, [...].
        se: standard error of each reward, [n]; weights are 1 / se^2. None gives equal weights.
        confidence: of the profile interval.
        most: the largest reward there is; A stays below it.
        values: number of values of A in the profile.

    Raises:
        UserError: fewer than five points, or compute that is not positive.
    """
    compute, y = np.asarray(compute, dtype=np.float64), np.asarray(reward, dtype=np.float64)
    if len(compute) < 5 or not (compute > 0).all():
        raise UserError(
            f"a reward-compute curve needs at least 5 points with positive compute, but there are {len(compute)}; "
            "evaluate more often"
        )
    start = np.broadcast_to(np.asarray(start, dtype=np.float64), y.shape[:-1])
    weights = np.ones(len(compute)) if se is None else (1 / np.asarray(se)) ** 2 / np.mean((1 / np.asarray(se)) ** 2)
    x = np.log(compute)
    bounds = ceiling_bounds(y, start, most)
    box = midpoint_box(x)
    first = _first_values(x, y, start, weights, bounds, box)
    low = np.stack([bounds[0], np.full_like(start, box[0][0]), np.full_like(start, box[0][1])], -1)
    high = np.stack([bounds[1], np.full_like(start, box[1][0]), np.full_like(start, box[1][1])], -1)
    fit = levenberg(lambda theta: sigmoid_curve(x, start, theta), y, first, low=low, high=high, weights=weights)
    ends = _profile(x, y, start, weights, fit, (bounds, box), confidence, values)
    half = (start + fit.theta[..., 0]) / 2
    last = sigmoid_curve(x, start, fit.theta)[0][..., -1]
    rising = fit.theta[..., 0] > start
    identified = np.where(rising, last > half, last < half) & (ends[1] - ends[0] < NARROW)
    nan = np.full(np.shape(fit.sse), np.nan)[()]
    free = len(x) - 3
    ceiling = Estimate(fit.theta[..., 0][()], nan, ends[0][()], ends[1][()], free, confidence, "profile of one curve")
    middle, steep = np.exp(fit.theta[..., 1])[()], np.exp(fit.theta[..., 2])[()]
    return SigmoidFit(ceiling, middle, steep, start[()], identified[()], fit)


def sigmoid_curve(x: np.ndarray, start: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the curve [..., n] and its derivatives [..., n, 3].

    Args:
        x: logarithm of the compute, [n].
        start: R_0, [...].
        theta: A, ln C_mid and ln B, [..., 3].
    """
    top, middle, steep = theta[..., :1], theta[..., 1:2], np.exp(theta[..., 2:3])
    share = 1 / (1 + np.exp(np.clip(steep * (middle - x), -500, 500)))
    reach = top - start[..., None]
    bend = reach * share * (1 - share)
    slope = np.stack([share, -bend * steep, bend * steep * (x - middle)], -1)
    return start[..., None] + reach * share, slope


def ceiling_bounds(y: np.ndarray, start: np.ndarray, most: float) -> _Pair:
    """Return the least and largest ceiling [...] that a fit considers: a falling curve has a ceiling below R_0.

    Args:
        y: reward of each evaluation, [..., n].
        start: R_0, [...].
        most: the largest reward there is.
    """
    reach = np.maximum(np.ptp(y, axis=-1), 1e-6)
    return np.minimum(y.min(-1), start) - reach, np.maximum(np.full_like(start, most), y.max(-1))


def midpoint_box(x: np.ndarray) -> _Box:
    """Return lower and upper bounds of (ln C_mid, ln B): a midpoint lies at most a factor 20 outside the data."""
    return (
        (float(x.min() - np.log(20)), float(np.log(STEEPNESS[0]))),
        (float(x.max() + np.log(20)), float(np.log(STEEPNESS[1]))),
    )


def _first_values(
    x: np.ndarray, y: np.ndarray, start: np.ndarray, weights: np.ndarray, bounds: _Pair, box: _Box
) -> np.ndarray:
    """Return the best (A, ln C_mid, ln B) of a grid, [..., 3], with A solved by linear least squares."""
    middle = np.repeat(np.linspace(x.min() - 1, x.max() + 1.5, _MIDPOINTS), _STEEP)
    steep = np.tile(np.linspace(box[0][1], box[1][1], _STEEP), _MIDPOINTS)
    share = 1 / (1 + np.exp(np.clip(np.exp(steep)[:, None] * (middle[:, None] - x), -500, 500)))
    away = y - start[..., None]
    cross, square = (away * weights) @ share.T, (weights * share**2).sum(-1)
    top = np.clip(cross / square, (bounds[0] - start)[..., None], (bounds[1] - start)[..., None])
    best = np.argmin(top**2 * square - 2 * top * cross, axis=-1)
    found = np.take_along_axis(top, best[..., None], -1)[..., 0] + start
    return np.stack([found, middle[best], steep[best]], -1)


def _profile(
    x: np.ndarray,
    y: np.ndarray,
    start: np.ndarray,
    weights: np.ndarray,
    fit: Fit,
    limits: tuple[_Pair, _Box],
    confidence: float,
    values: int,
) -> _Pair:
    """Return the ends of the profile interval of A, on a grid that is fine near the estimate."""
    (least, most), box = limits
    top = fit.theta[..., 0]
    # Distances from the estimate, quadratic: fine near it, and the ends are the bounds.
    side = np.linspace(0, 1, values // 2 + 1) ** 2
    below = top[..., None] - side[:0:-1] * np.maximum(top - least, 1e-9)[..., None]
    above = top[..., None] + side * np.maximum(most - top, 1e-9)[..., None]
    grid = np.concatenate([below, above], -1)

    def fixed(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        curve, slope = sigmoid_curve(x, start[..., None], np.concatenate([grid[..., None], theta], -1))
        return curve, slope[..., 1:]

    first = np.broadcast_to(fit.theta[..., None, 1:], (*grid.shape, 2))
    sse = levenberg(
        fixed, y[..., None, :], first, low=np.array(box[0]), high=np.array(box[1]), weights=weights, iterations=8
    ).sse
    at = np.arange(grid.shape[-1], dtype=np.float64)
    low, high = profile_interval(at, sse, fit.sse, points=len(x), parameters=3, confidence=confidence)
    return _on_grid(grid, low), _on_grid(grid, high)


def _on_grid(grid: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the value of each grid [..., g] at a fractional position [...]; an infinite position stays."""
    known = np.isfinite(at)
    place = np.where(known, at, 0.0)
    base = np.clip(np.floor(place).astype(int), 0, grid.shape[-1] - 2)
    left = np.take_along_axis(grid, base[..., None], -1)[..., 0]
    right = np.take_along_axis(grid, base[..., None] + 1, -1)[..., 0]
    return np.where(known, left + (place - base) * (right - left), at)

"""Least squares of many small curves at once.

scipy.optimize.least_squares fits one curve a call, about 5 ms. A profile over a parameter, a bootstrap or a coverage
test fits thousands, so this is the same Levenberg-Marquardt iteration with the curves as leading axes of the arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

_TOLERANCE = 1e-8  # a fit ends when a step changes its sum of squares by less than this share
_MOST_DAMPING = 1e6
CurveModel = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Fit:
    """Fitted parameters [..., p], weighted sum of squares [...] and number of points and free parameters."""

    theta: np.ndarray
    sse: np.ndarray
    points: int
    parameters: int

    @property
    def aicc(self) -> np.ndarray:
        """n ln(SSE / n) + 2p + 2p(p + 1) / (n - p - 1), Hurvich and Tsai, Biometrika 76, 1989; inf if n <= p + 1.

        The variance counts as one of the p parameters.
        """
        n, p = self.points, self.parameters + 1
        if n <= p + 1:
            return np.full(np.shape(self.sse), np.inf)
        tiny = np.finfo(float).tiny
        return n * np.log(np.maximum(self.sse, tiny) / n) + 2 * p + 2 * p * (p + 1) / (n - p - 1)


def levenberg(
    model: CurveModel,
    y: np.ndarray,
    start: np.ndarray,
    *,
    low: np.ndarray,
    high: np.ndarray,
    weights: np.ndarray | float = 1.0,
    iterations: int = 40,
) -> Fit:
    """Minimize sum(weights * (y - model(theta))^2) over theta in a box, for every leading index.

    Args:
        model: from theta [..., p] to the curve [..., n] and its derivatives [..., n, p].
        y: observed values, [..., n].
        start: first parameters, [..., p].
        low: lower bounds, [p] or [..., p].
        high: upper bounds, [p] or [..., p].
        weights: of the points, [n] or a number.
        iterations: steps of the iteration.
    """
    theta = np.clip(np.array(start, dtype=np.float64), low, high)
    curve, slope = model(theta)
    sse = (weights * (y - curve) ** 2).sum(-1)
    damping = np.full(sse.shape, 1e-3)
    done = np.zeros(sse.shape, dtype=bool)
    eye = np.eye(theta.shape[-1])
    for _ in range(iterations):
        weighted = np.swapaxes(slope, -1, -2) * weights
        gradient = (weighted @ (y - curve)[..., None])[..., 0]
        # A parameter at its bound that wants to leave the box is fixed for this step.
        stuck = ((theta <= low) & (gradient < 0)) | ((theta >= high) & (gradient > 0))
        gradient = np.where(stuck, 0.0, gradient)
        normal = weighted @ slope
        normal = np.where(stuck[..., None] | stuck[..., None, :], 0.0, normal)
        diagonal = np.einsum("...pp->...p", normal)
        ridge = damping[..., None] * diagonal + stuck + 1e-12 * (1 + diagonal.max(-1, keepdims=True))
        step = np.linalg.solve(normal + ridge[..., None] * eye, gradient[..., None])[..., 0]
        trial = np.clip(theta + step, low, high)
        trial_curve, trial_slope = model(trial)
        trial_sse = (weights * (y - trial_curve) ** 2).sum(-1)
        better = trial_sse < sse
        done = done | (np.abs(sse - trial_sse) <= _TOLERANCE * sse) | (damping > _MOST_DAMPING)
        theta = np.where(better[..., None], trial, theta)
        curve = np.where(better[..., None], trial_curve, curve)
        slope = np.where(better[..., None, None], trial_slope, slope)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e9)
        sse = np.where(better, trial_sse, sse)
        if done.all():
            break
    return Fit(theta, sse, y.shape[-1], theta.shape[-1])


def profile_interval(
    grid: np.ndarray, sse: np.ndarray, least: np.ndarray, *, points: int, parameters: int, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of {v: SSE(v) <= least (1 + F_{1, n-p} / (n - p))}, interpolated on the grid.

    This is the likelihood-ratio interval of one parameter of a nonlinear fit with unknown variance (Bates and Watts,
    "Nonlinear regression analysis", 1988, section 6.1). An end that the grid does not reach is -inf or inf. The errors
    must be independent: values along one run are not quite, and then the interval is too short.

    Args:
        grid: values of the parameter, ascending, [g].
        sse: sum of squares with the parameter fixed, [..., g].
        least: sum of squares of the free fit, [...].
        points: number of data, n.
        parameters: free parameters p of the whole model.
        confidence: of the interval.
    """
    free = points - parameters
    if free < 1:
        shape = np.shape(least)
        return np.full(shape, -np.inf), np.full(shape, np.inf)
    # The root of the excess is nearly linear in the parameter, so that a coarse grid gives the ends well.
    root = np.sqrt(np.maximum(sse - least[..., None], 0.0))
    excess = root - np.sqrt(least * stats.f.ppf(confidence, 1, free) / free)[..., None]
    inside = excess <= 0
    best = np.argmin(sse, axis=-1)
    at = np.arange(len(grid))
    # The outermost crossing on each side of the best value. A free fit between two values of the grid may leave no
    # value inside; then the best value of the grid stands for it.
    inside |= at == best[..., None]
    first = np.argmax(inside, axis=-1)
    last = len(grid) - 1 - np.argmax(inside[..., ::-1], axis=-1)
    low = np.where(first == 0, -np.inf, _crossing(grid, excess, first - 1, first))
    high = np.where(last == len(grid) - 1, np.inf, _crossing(grid, excess, last + 1, last))
    return low, high


def _crossing(grid: np.ndarray, excess: np.ndarray, outside: np.ndarray, inside: np.ndarray) -> np.ndarray:
    outside = np.clip(outside, 0, len(grid) - 1)
    out = np.take_along_axis(excess, outside[..., None], -1)[..., 0]
    into = np.minimum(np.take_along_axis(excess, inside[..., None], -1)[..., 0], 0.0)
    share = np.where(out > into, -into / np.where(out > into, out - into, 1.0), 0.0)
    return grid[inside] + share * (grid[outside] - grid[inside])

"""Ceiling or efficiency: does an arm change where the reward curve ends, or only how fast it gets there?"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_rl.statistics.fit_curves import Fit, levenberg
from megatron_rl.statistics.sigmoid import ceiling_bounds, fit_sigmoid, midpoint_box, sigmoid_curve


@dataclass(frozen=True)
class NestedFits:
    """Three fits of all arms' curves together. R_0 is measured for each arm, B is shared.

    Attributes:
        one: M0, one curve for all arms.
        efficiency: M1, a C_mid for each arm.
        ceiling: M2, a C_mid and an A for each arm.
        p_efficiency: p value of the F test of M1 against M0.
        p_ceiling: p value of the F test of M2 against M1.
    """

    one: Fit
    efficiency: Fit
    ceiling: Fit
    p_efficiency: np.ndarray
    p_ceiling: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """The number of the model with the least AICc: 0, 1 or 2."""
        return np.argmin(np.stack([self.one.aicc, self.efficiency.aicc, self.ceiling.aicc]), axis=0)


def nested_fits(compute: np.ndarray, reward: np.ndarray, start: np.ndarray, *, most: float = 1.0) -> NestedFits:
    """Fit M0, M1 and M2 and compare them by F = [(SSE_0 - SSE_1) / dp] / [SSE_1 / (n - p_1)] and by AICc.

    The F test is the usual one of nested nonlinear fits (Bates and Watts 1988, section 3.10). It takes the points of
    the curves as independent. Those of one run share its seed, so with real runs p is too small, and a claim needs the
    paired differences of per-seed fits as well.

    Args:
        compute: positive compute of each evaluation, [n], the same for all arms.
        reward: reward, [..., arms, n].
        start: reward before training, [..., arms].
        most: the largest reward there is.
    """
    y, start = np.asarray(reward, dtype=np.float64), np.asarray(start, dtype=np.float64)
    arms, _n = y.shape[-2:]
    x = np.log(compute)
    alone = fit_sigmoid(compute, y, start, most=most, values=3).fit.theta
    mean = alone.mean(-2)
    one = _fit(x, y, start, mean, (1, 1), most)
    # Every wider model also starts where the narrower one ended, so that its sum of squares is never larger.
    wide = np.concatenate([mean[..., :1], alone[..., 1], mean[..., 2:]], -1)
    from_one = np.concatenate([one.theta[..., :1], np.repeat(one.theta[..., 1:2], arms, -1), one.theta[..., 2:]], -1)
    efficiency = _better(*(_fit(x, y, start, first, (1, arms), most) for first in (wide, from_one)))
    widest = np.concatenate([alone[..., 0], alone[..., 1], mean[..., 2:]], -1)
    tops = np.repeat(efficiency.theta[..., :1], arms, -1)
    from_efficiency = np.concatenate([tops, efficiency.theta[..., 1:]], -1)
    ceiling = _better(*(_fit(x, y, start, first, (arms, arms), most) for first in (widest, from_efficiency)))
    return NestedFits(one, efficiency, ceiling, f_test(one, efficiency), f_test(efficiency, ceiling))


def f_test(narrow: Fit, wide: Fit) -> np.ndarray:
    """Return the p value of the F test of two nested fits."""
    extra, free = wide.parameters - narrow.parameters, wide.points - wide.parameters
    if free < 1:
        return np.ones(np.shape(wide.sse))
    ratio = (narrow.sse - wide.sse) / extra / np.maximum(wide.sse / free, np.finfo(float).tiny)
    return stats.f.sf(np.maximum(ratio, 0), extra, free)


def _better(first: Fit, second: Fit) -> Fit:
    chosen = first.sse <= second.sse
    theta = np.where(chosen[..., None], first.theta, second.theta)
    return Fit(theta, np.where(chosen, first.sse, second.sse), first.points, first.parameters)


def _fit(
    x: np.ndarray, y: np.ndarray, start: np.ndarray, first: np.ndarray, shape: tuple[int, int], most: float
) -> Fit:
    """Fit theta = (A [a], ln C_mid [m], ln B), with a and m either 1 or the number of arms."""
    tops, middles = shape
    arms, n = y.shape[-2:]
    to_top = np.ones((arms, 1)) if tops == 1 else np.eye(arms)
    to_middle = np.ones((arms, 1)) if middles == 1 else np.eye(arms)

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        top, middle = theta[..., :tops] @ to_top.T, theta[..., tops:-1] @ to_middle.T
        steep = np.broadcast_to(theta[..., -1:], top.shape)
        curve, slope = sigmoid_curve(x, start, np.stack([top, middle, steep], -1))
        d_top = slope[..., :1] * to_top[:, None, :]
        d_middle = slope[..., 1:2] * to_middle[:, None, :]
        jacobian = np.concatenate([d_top, d_middle, slope[..., 2:]], -1)
        return curve.reshape(*curve.shape[:-2], -1), jacobian.reshape(*curve.shape[:-2], arms * n, -1)

    least, largest = ceiling_bounds(y, start, most)
    box = midpoint_box(x)
    low, high = np.empty_like(first), np.empty_like(first)
    low[..., :tops], high[..., :tops] = least.min(-1, keepdims=True), largest.max(-1, keepdims=True)
    low[..., tops:-1], high[..., tops:-1] = box[0][0], box[1][0]
    low[..., -1], high[..., -1] = box[0][1], box[1][1]
    return levenberg(model, y.reshape(*y.shape[:-2], -1), first, low=low, high=high)

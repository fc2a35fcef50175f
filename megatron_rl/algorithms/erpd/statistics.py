"""Statistics of Extreme Region Policy Distillation (arXiv 2605.25582), per token, in float64; no model, no files.

A teacher pi_e gives its student the signal log pi_e - log pi_den on the fixed batch. Every array is flat, with one
entry per token of the batch. `trained` [N] bool marks the tokens that were sampled and count.
"""

from dataclasses import dataclass

import numpy as np

SHIFT_EDGES = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, np.inf)
_POSITIVE = 0.5  # a trajectory with this reward or a larger one is positive


def raw_signal(loge: np.ndarray, logden: np.ndarray, floor: float) -> np.ndarray:
    """Return the signal log pi_e - log pi_den, [N] float64.

    A floor on pi_e is needed because a saturated teacher reaches -inf. The same floor is applied to pi_den, so that a
    saturated teacher that is its own denominator gives the signal 0.

    Args:
        loge: [N], log pi_e.
        logden: [N], log pi_den.
        floor: lower bound of both log-probabilities.
    """
    return np.maximum(loge.astype(np.float64), floor) - np.maximum(logden.astype(np.float64), floor)


def negative_on_positives(raw: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Return [N]: min(0, raw) on tokens of positive trajectories, raw elsewhere.

    The teacher's peaks on positive trajectories are outliers. `rewards` [N] is the reward of each token's trajectory.
    """
    return np.where(rewards >= _POSITIVE, np.minimum(raw, 0.0), raw)


def kl_to_old(logp: np.ndarray, logold: np.ndarray, trained: np.ndarray) -> float:
    """Return the reverse KL(pi || pi_old) in nats per token, estimated on samples of pi_old.

    The estimate is the mean of r log r - r + 1 with r = pi / pi_old. The weights r make it unbiased on these samples,
    and each term is non-negative.

    Args:
        logp: [N], log pi.
        logold: [N], log pi_old.
        trained: [N] bool.
    """
    log_ratio = (logp.astype(np.float64) - logold.astype(np.float64))[trained]
    ratio = np.exp(log_ratio)
    return float(np.mean(ratio * log_ratio - ratio + 1))


def explained_variance(loge: np.ndarray, rewards: np.ndarray, trained: np.ndarray) -> float:
    """Return 1 - Var(R - pi_e) / Var(R) over trained tokens; nan if all rewards are equal.

    Args:
        loge: [N], log pi_e.
        rewards: [N], reward of each token's trajectory.
        trained: [N] bool.
    """
    reward, probability = rewards[trained].astype(np.float64), np.exp(loge[trained].astype(np.float64))
    spread = reward.var()
    return float(1 - (reward - probability).var() / spread) if spread > 0 else float("nan")


@dataclass(frozen=True)
class ShiftTable:
    """Figure 7: tokens by the size of the teacher's shift, and the share of it that the student followed.

    Tokens that the teacher did not shift have no share.

    Attributes:
        edges: [K + 1], bins of |log pi_e - log pi_old|, closed below.
        count: [K], tokens in each bin.
        mean: [K], mean of |log pi - log pi_old| / |log pi_e - log pi_old|; nan in an empty bin.
        median: [K], median of the same; nan in an empty bin.
    """

    edges: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    median: np.ndarray


def shift_table(loge: np.ndarray, logold: np.ndarray, logp: np.ndarray, trained: np.ndarray) -> ShiftTable:
    """Return the table of the trained tokens.

    Args:
        loge: [N], log-probabilities of the teacher.
        logold: [N], of the old policy.
        logp: [N], of the student.
        trained: [N] bool.
    """
    old = logold[trained].astype(np.float64)
    teacher, student = (np.abs(column[trained].astype(np.float64) - old) for column in (loge, logp))
    edges = np.array(SHIFT_EDGES)
    place = np.digitize(teacher, edges) - 1
    bins = len(edges) - 1
    mean, median = np.full(bins, np.nan), np.full(bins, np.nan)
    for at in range(bins):
        chosen = (place == at) & (teacher > 0)
        if chosen.any():
            followed = student[chosen] / teacher[chosen]
            mean[at], median[at] = followed.mean(), np.median(followed)
    return ShiftTable(edges, np.bincount(place, minlength=bins), mean, median)

"""Numbers of Extreme Region Policy Distillation (arXiv 2605.25582), per token, in float64: no model, no files.

A teacher pi_e speaks to its student through log pi_e - log pi_den on the fixed batch. Every array is flat, one entry
a token of the batch; `trained` [N] bool says which of them were sampled and count.
"""

from dataclasses import dataclass

import numpy as np

SHIFT_EDGES = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, np.inf)
_POSITIVE = 0.5  # a trajectory of this reward or a larger one is a positive one


def raw_signal(loge: np.ndarray, logden: np.ndarray, floor: float) -> np.ndarray:
    """[N] float64: log pi_e - log pi_den. floor: least value of log pi_e, since a saturated teacher reaches -inf.

    The same bound holds for pi_den: a saturated teacher that is its own denominator must say nothing.
    """
    return np.maximum(loge.astype(np.float64), floor) - np.maximum(logden.astype(np.float64), floor)


def negative_on_positives(raw: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """[N]: min(0, raw) on tokens of positive trajectories (their teacher's peaks are outliers), raw elsewhere.

    rewards [N]: the reward of each token's trajectory.
    """
    return np.where(rewards >= _POSITIVE, np.minimum(raw, 0.0), raw)


def kl_to_old(logp: np.ndarray, logold: np.ndarray, trained: np.ndarray) -> float:
    """Reverse KL(pi || pi_old) in nats per token, estimated on samples of pi_old: mean of r log r - r + 1, r = pi/pi_old.

    The weights r are what makes it unbiased there; each term is non-negative.
    """
    log_ratio = (logp.astype(np.float64) - logold.astype(np.float64))[trained]
    ratio = np.exp(log_ratio)
    return float(np.mean(ratio * log_ratio - ratio + 1))


def explained_variance(loge: np.ndarray, rewards: np.ndarray, trained: np.ndarray) -> float:
    """1 - Var(R - pi_e) / Var(R) over trained tokens; nan when all rewards agree. rewards [N]: per token."""
    reward, probability = rewards[trained].astype(np.float64), np.exp(loge[trained].astype(np.float64))
    spread = reward.var()
    return float(1 - (reward - probability).var() / spread) if spread > 0 else float("nan")


@dataclass(frozen=True)
class ShiftTable:
    """Figure 7: tokens by how far the teacher went, and how far of that the student followed.

    edges [K + 1]: bins of |log pi_e - log pi_old|, closed below. count [K]: tokens. mean, median [K]: of
    |log pi - log pi_old| / |log pi_e - log pi_old|, nan in an empty bin; tokens the teacher left alone have no ratio.
    """

    edges: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    median: np.ndarray


def shift_table(loge: np.ndarray, logold: np.ndarray, logp: np.ndarray, trained: np.ndarray) -> ShiftTable:
    """loge, logold, logp [N]: teacher, old policy, student."""
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

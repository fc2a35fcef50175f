"""Where the variance of the reward comes from: arm (precision, method), seed, prompt, sampling."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_rl.statistics.estimate import Estimate


@dataclass(frozen=True)
class VarianceShares:
    """Variance components of single rewards, in squared reward. Fields are numbers, or arrays over data sets.

    Attributes:
        arm: differences of the arms' means.
        seed: seeds, and seeds within arms.
        prompt: difficulty of the prompts.
        arm_prompt: prompts on which arms differ.
        rest: everything else: sampling, and seeds that differ on a prompt.
        sampling: the part of `rest` that is chance of one sample; NaN when it cannot be told.
    """

    arm: np.ndarray
    seed: np.ndarray
    prompt: np.ndarray
    arm_prompt: np.ndarray
    rest: np.ndarray
    sampling: np.ndarray

    def shares(self) -> dict[str, np.ndarray]:
        """Return each component's share of their sum; `rest` is without sampling where sampling is known."""
        known = np.isfinite(self.sampling)
        chance = np.where(known, np.minimum(self.sampling, self.rest), 0.0)
        parts = {"arm": self.arm, "seed": self.seed, "prompt": self.prompt, "arm x prompt": self.arm_prompt}
        parts |= {"sampling": chance, "rest": self.rest - chance}
        total = np.maximum(sum(parts.values()), np.finfo(float).tiny)
        return {name: part / total for name, part in parts.items()}


def variance_components(reward: np.ndarray, *, sampling: np.ndarray | float = float("nan")) -> VarianceShares:
    """Estimate the components of y_asi = m + A_a + S_s + (AS)_as + P_i + (AP)_ai + (SP)_si + e_asi.

    Method of moments of the three-way crossed random-effects analysis of variance without replication: expected mean
    squares are solved for the components, and negative ones are set to zero (Searle, Casella, McCulloch 1992, chapter
    5). The shares describe these runs. With few arms and seeds they are rough, and no claim rests on them.

    Args:
        reward: mean reward over samples, [..., arms, seeds, prompts], at least two of each.
        sampling: variance of that mean by chance, mean of s^2 / K over all cells, if it is known.
    """
    y = np.asarray(reward, dtype=np.float64)
    sizes = dict(zip("asi", y.shape[-3:], strict=True))
    axes = {"a": -3, "s": -2, "i": -1}
    squares = {kept: _mean_square(y, kept, axes, sizes) for kept in ("a", "s", "i", "as", "ai", "si", "asi")}
    a, s, i = sizes["a"], sizes["s"], sizes["i"]
    rest = squares["asi"]
    pair = {kept: np.maximum(squares[kept] - rest, 0) for kept in ("as", "ai", "si")}
    arm = (squares["a"] - squares["as"] - squares["ai"] + rest) / (s * i)
    seed = (squares["s"] - squares["as"] - squares["si"] + rest) / (a * i)
    prompt = (squares["i"] - squares["ai"] - squares["si"] + rest) / (a * s)
    seed_all = np.maximum(seed, 0) + pair["as"] / i
    chance = np.broadcast_to(np.asarray(sampling, dtype=np.float64), np.shape(rest))
    return VarianceShares(
        np.maximum(arm, 0), seed_all, np.maximum(prompt, 0), pair["ai"] / s, rest + pair["si"] / a, chance[()]
    )


def seed_sd(values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Estimate the standard deviation over seeds with the chi-square interval of normal data.

    Args:
        values: one value a seed, [..., seeds]; at least two.
        confidence: of the interval.
    """
    values = np.asarray(values, dtype=np.float64)
    df = values.shape[-1] - 1
    sd = values.std(-1, ddof=1)
    low = sd * np.sqrt(df / stats.chi2.ppf(0.5 + confidence / 2, df))
    high = sd * np.sqrt(df / stats.chi2.ppf(0.5 - confidence / 2, df))
    return Estimate(sd, sd / np.sqrt(2 * df), low, high, df, confidence, f"chi-square, {df + 1} seeds")


def _mean_square(y: np.ndarray, kept: str, axes: dict[str, int], sizes: dict[str, int]) -> np.ndarray:
    """Return the mean square of the interaction of the kept factors: alternating sum of the marginal means."""
    effect: np.ndarray | float = 0.0
    subsets = [[f for j, f in enumerate(kept) if mask >> j & 1] for mask in range(2 ** len(kept))]
    for subset in subsets:
        gone = tuple(axis for factor, axis in axes.items() if factor not in subset)
        effect = effect + (-1) ** (len(kept) - len(subset)) * (y.mean(gone, keepdims=True) if gone else y)
    copies = np.prod([sizes[f] for f in axes if f not in kept])
    return (np.asarray(effect) ** 2).sum((-3, -2, -1)) * copies / np.prod([sizes[f] - 1 for f in kept])

"""The bootstrap interval over seeds, then prompts."""

import numpy as np

from megatron_rl.statistics.estimate import Estimate


def seed_prompt_bootstrap(
    deltas: np.ndarray, rng: np.random.Generator, *, draws: int = 10_000, confidence: float = 0.95
) -> Estimate:
    """Return the percentile interval of a mean over seeds and prompts.

    Each draw takes seeds with replacement, then prompts with replacement, the same prompts for every seed and arm,
    because all of them answered the same prompts (the "pigeonhole bootstrap" of crossed factors, Owen, Annals of
    Applied Statistics 1, 2007). The draws are counts, so all of them are two matrix products.

    It misses its confidence in both directions. With few seeds that differ much it is too short (S values spread
    (S - 1) / S of the truth, and percentiles know no t). Where sampling noise dominates it is too long, because that
    noise is drawn once with the seeds and once with the prompts. It is shown beside the t interval and decides nothing.

    Args:
        deltas: differences, [seeds, prompts].
        rng: source of the draws.
        draws: number of draws.
        confidence: of the interval.
    """
    seeds, prompts = deltas.shape
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    prompt_counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    means = ((seed_counts @ deltas) * prompt_counts).sum(1) / (seeds * prompts)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    method = f"bootstrap of {seeds} seeds and {prompts} prompts"
    return Estimate(float(deltas.mean()), float(means.std()), float(low), float(high), np.inf, confidence, method)

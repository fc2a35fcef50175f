"""Bootstrap intervals: seeds, then prompts; and blocks of one series."""

import numpy as np

from megatron_rl.statistics.estimate import Estimate


def seed_prompt_bootstrap(
    deltas: np.ndarray, rng: np.random.Generator, *, draws: int = 10_000, confidence: float = 0.95
) -> Estimate:
    """Return the percentile interval of a mean over seeds and prompts.

    Each draw takes seeds with replacement, then prompts with replacement, the same prompts for every seed and arm,
    because all of them answered the same prompts (the "pigeonhole bootstrap" of crossed factors, Owen, Annals of
    Applied Statistics 1, 2007). The draws are counts, so all of them are two matrix products.

    With few seeds the interval is too short: the spread of S values is (S - 1) / S of the true one and the percentiles
    know no t. It is shown beside the t interval and decides nothing below 10 seeds.

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
    method = f"bootstrap of {seeds} seeds and {prompts} prompts"
    return _percentile(float(deltas.mean()), means, confidence, method)


def block_bootstrap(
    series: np.ndarray, rng: np.random.Generator, *, draws: int = 2_000, confidence: float = 0.95
) -> Estimate:
    """Return the percentile interval of the mean of one series by moving blocks.

    Blocks of about n^(1/3) neighbors keep the correlation along a run (Kuensch, Annals of Statistics 17, 1989). The
    interval is about the noise of this one run. It does not speak about other seeds.

    Args:
        series: values in the order of the steps, [n].
        rng: source of the draws.
        draws: number of draws.
        confidence: of the interval.
    """
    n = len(series)
    length = max(1, round(n ** (1 / 3)))
    blocks = np.lib.stride_tricks.sliding_window_view(series, length)
    taken = rng.integers(len(blocks), size=(draws, -(-n // length)))
    means = blocks[taken].reshape(draws, -1)[:, :n].mean(1)
    return _percentile(float(series.mean()), means, confidence, "moving blocks of one seed")


def _percentile(value: float, draws: np.ndarray, confidence: float, method: str) -> Estimate:
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(value, float(draws.std()), float(low), float(high), np.inf, confidence, method)

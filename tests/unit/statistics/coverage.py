"""What the coverage tests share: number of simulations, the band they accept, and data of known truth."""

from typing import Any

import numpy as np

SIMULATIONS = 2_000
# The share of 95 % intervals that must contain the truth. Its Monte Carlo error at 2,000 simulations is 0.5 points.
BAND = (0.93, 0.97)
# A test at 5 % may reject this often: 5 % and 2.6 Monte Carlo errors.
LEVEL = 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / SIMULATIONS)


def within(share: Any) -> bool:
    """Return whether a share of covered truths lies in the band."""
    return bool(BAND[0] <= share <= BAND[1])


def crossed(
    rng: np.random.Generator,
    seeds: int,
    prompts: int,
    *,
    by_seed: float,
    by_prompt: float,
    noise: float,
    mean: float = 0.0,
    simulations: int = SIMULATIONS,
) -> np.ndarray:
    """Return differences [simulations, seeds, prompts] with these standard deviations of seeds, prompts and noise."""
    shape = (simulations, seeds, prompts)
    return (
        mean
        + by_seed * rng.standard_normal((simulations, seeds, 1))
        + by_prompt * rng.standard_normal((simulations, 1, prompts))
        + noise * rng.standard_normal(shape)
    )


def sigmoid_rewards(compute: np.ndarray, top: Any, middle: Any, steep: float, start: float) -> np.ndarray:
    """Return the rewards of a sigmoid curve, written apart from the package's own."""
    return start + (top - start) / (1 + (middle / compute) ** steep)

import numpy as np

from megatron_rl.statistics.bootstrap import seed_prompt_bootstrap
from tests.unit.statistics.coverage import crossed, within


def coverage(seeds: int, by_seed: float, by_prompt: float, noise: float) -> float:
    rng = np.random.default_rng(seeds)
    data = crossed(rng, seeds, 20, by_seed=by_seed, by_prompt=by_prompt, noise=noise, mean=0.3)
    return float(np.mean([seed_prompt_bootstrap(deltas, rng, draws=200).covers(0.3) for deltas in data]))


def test_the_bootstrap_covers_with_many_seeds_that_differ_and_is_too_short_with_few() -> None:
    assert within(coverage(20, 0.1, 0.3, 0.4))
    assert coverage(4, 0.3, 0.05, 0.1) < 0.9  # why it decides nothing below 10 seeds


def test_the_same_prompts_are_drawn_for_every_seed() -> None:
    """If prompts alone differ, drawing them anew for each seed would shrink the interval by the root of the seeds."""
    deltas = np.tile(np.random.default_rng(0).standard_normal(50), (8, 1))
    found = seed_prompt_bootstrap(deltas, np.random.default_rng(1), draws=4_000)
    assert abs(found.se / (deltas[0].std() / np.sqrt(50)) - 1) < 0.05

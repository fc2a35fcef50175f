import numpy as np
import pytest
from scipy import stats

from megatron_rl.statistics.paired import crossed_difference, prompt_difference, seed_difference
from tests.unit.statistics.coverage import SIMULATIONS, crossed, within

SCENES = [
    # by_seed, by_prompt, noise
    (0.1, 0.0, 1.0),
    (0.1, 0.5, 1.0),
    (0.0, 0.5, 1.0),
    (0.3, 0.2, 0.5),
]


@pytest.mark.parametrize("seeds", [3, 5, 10, 20])
def test_the_interval_of_a_difference_covers_the_truth_for_other_seeds_and_prompts(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    for by_seed, by_prompt, noise in SCENES:
        deltas = crossed(rng, seeds, 60, by_seed=by_seed, by_prompt=by_prompt, noise=noise, mean=0.3)
        share = crossed_difference(deltas).covers(0.3).mean()
        assert within(share), f"{share} with {seeds} seeds, seeds {by_seed}, prompts {by_prompt}, noise {noise}"


def test_t_on_seed_means_covers_the_truth_of_these_prompts_but_not_of_other_prompts() -> None:
    rng = np.random.default_rng(0)
    deltas = crossed(rng, 10, 60, by_seed=0.1, by_prompt=0.5, noise=1.0, mean=0.3)
    assert seed_difference(deltas.mean(-1)).covers(0.3).mean() < 0.90
    prompt_effects = crossed(rng, 1, 60, by_seed=0.0, by_prompt=0.5, noise=0.0)
    same = crossed(rng, 10, 60, by_seed=0.1, by_prompt=0.0, noise=1.0, mean=0.3) + prompt_effects
    assert within(seed_difference(same.mean(-1)).covers(0.3 + prompt_effects.mean((1, 2))).mean())


def test_an_interval_that_ignores_seeds_fails_coverage() -> None:
    """The negative control: prompts of all seeds as if they were independent."""
    deltas = crossed(np.random.default_rng(0), 5, 60, by_seed=0.3, by_prompt=0.2, noise=0.5, mean=0.3)
    wrong = prompt_difference(deltas.reshape(SIMULATIONS, -1), np.zeros((SIMULATIONS, 300)))
    assert wrong.covers(0.3).mean() < 0.6


def test_prompts_of_one_source_need_the_clustered_error() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), 5)
    shared = 0.3 * rng.standard_normal((SIMULATIONS, 12))[:, clusters]
    first = 0.1 + shared + 0.5 * rng.standard_normal((SIMULATIONS, 60))
    second = np.zeros_like(first)
    assert within(prompt_difference(first, second, clusters=clusters).covers(0.1).mean())
    assert prompt_difference(first, second).covers(0.1).mean() < 0.9


def test_one_seed_has_an_interval_over_prompts_and_none_over_seeds() -> None:
    rng = np.random.default_rng(0)
    first, second = 0.1 + rng.standard_normal((SIMULATIONS, 40)), rng.standard_normal((SIMULATIONS, 40))
    assert within(prompt_difference(first, second).covers(0.1).mean())
    alone = seed_difference(np.array([0.2]))
    assert (alone.low, alone.high) == (-np.inf, np.inf)


def test_the_paired_error_is_that_of_scipy() -> None:
    first, second = np.random.default_rng(0).standard_normal((2, 30))
    ours, theirs = prompt_difference(first, second), stats.ttest_rel(first, second).confidence_interval()
    assert np.allclose([ours.low, ours.high], [theirs.low, theirs.high])

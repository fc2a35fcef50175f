import numpy as np
import pytest
from scipy import stats

from megatron_rl.statistics.equivalence import (
    detectable_seed_difference,
    difference_p,
    equivalence_power,
    holm,
    seeds_for_equivalence,
    tost,
)
from megatron_rl.statistics.estimate import t_estimate
from megatron_rl.statistics.paired import crossed_difference, prompt_difference, seed_difference
from tests.unit.statistics.coverage import LEVEL, SIMULATIONS, crossed

MARGIN = 0.1


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("scene", [(0.05, 0.0, 0.3), (0.03, 0.15, 0.3), (0.0, 0.0, 0.3)])
def test_equivalence_is_claimed_in_at_most_5_percent_when_the_truth_is_at_the_margin(
    seeds: int, scene: tuple[float, float, float]
) -> None:
    rng = np.random.default_rng(seeds)
    by_seed, by_prompt, noise = scene
    for truth in (MARGIN, -MARGIN):
        deltas = crossed(rng, seeds, 60, by_seed=by_seed, by_prompt=by_prompt, noise=noise, mean=truth)
        assert tost(crossed_difference(deltas), MARGIN).equivalent.mean() <= LEVEL


def test_a_test_that_ignores_seeds_claims_equivalence_far_too_often() -> None:
    deltas = crossed(np.random.default_rng(0), 5, 60, by_seed=0.15, by_prompt=0.0, noise=0.3, mean=MARGIN)
    wrong = prompt_difference(deltas.reshape(SIMULATIONS, -1), np.zeros((SIMULATIONS, 300)))
    assert tost(wrong, MARGIN).equivalent.mean() > 0.2


def test_equal_arms_are_found_equivalent_and_different_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    near = crossed(rng, 5, 60, by_seed=0.02, by_prompt=0.0, noise=0.3)
    assert tost(crossed_difference(near), MARGIN).equivalent.mean() > 0.95
    far = crossed(rng, 5, 60, by_seed=0.02, by_prompt=0.0, noise=0.3, mean=0.2)
    assert not tost(crossed_difference(far), MARGIN).equivalent.any()


def test_no_difference_is_claimed_in_5_percent_and_of_several_arms_after_holm() -> None:
    rng = np.random.default_rng(0)
    arms = [crossed(rng, 5, 40, by_seed=0.05, by_prompt=0.1, noise=0.3) for _ in range(6)]
    p = np.stack([difference_p(crossed_difference(deltas)) for deltas in arms], -1)
    assert (p[:, 0] < 0.05).mean() <= LEVEL
    assert (p < 0.05).any(-1).mean() > 0.15, "without a correction six arms give false claims"
    assert (holm(p) < 0.05).any(-1).mean() <= LEVEL


def test_equivalent_means_that_the_interval_of_90_percent_lies_inside_the_margin() -> None:
    values, errors = np.meshgrid(np.linspace(-0.12, 0.12, 25), np.linspace(0.001, 0.08, 25))
    found = tost(t_estimate(values, errors, np.full(values.shape, 4.0)), MARGIN)
    inside = (found.interval.low > -MARGIN) & (found.interval.high < MARGIN)
    assert np.array_equal(found.equivalent, inside)


def test_one_seed_is_never_equivalent() -> None:
    assert not tost(seed_difference(np.array([0.0])), MARGIN).equivalent


def test_holm_gives_worked_numbers() -> None:
    assert np.allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])


def test_the_power_lines_tell_what_simulations_find() -> None:
    rng = np.random.default_rng(0)
    shift = detectable_seed_difference(0.05, 5)
    found = stats.ttest_1samp(shift + 0.05 * rng.standard_normal((8 * SIMULATIONS, 5)), 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.015)
    equal = seed_difference(0.05 * rng.standard_normal((8 * SIMULATIONS, 6)))
    assert tost(equal, MARGIN).equivalent.mean() == pytest.approx(equivalence_power(0.05, 6, MARGIN), abs=0.015)
    needed = seeds_for_equivalence(0.05, MARGIN)
    assert equivalence_power(0.05, needed, MARGIN) >= 0.8 > equivalence_power(0.05, needed - 1, MARGIN)

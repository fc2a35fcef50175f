import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from megatron_rl.statistics.speedup import break_even, compute_to_reach, isotonic, speed_up
from tests.unit.statistics.coverage import SIMULATIONS, sigmoid_rewards, within

COMPUTE = np.geomspace(5, 300, 16)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("share", "by_seed"), [(0.5, 0.0), (0.5, 0.15), (0.8, 0.1)])
def test_the_speed_up_covers_the_truth(seeds: int, share: float, by_seed: float) -> None:
    rng = np.random.default_rng(seeds)
    luck = np.exp(by_seed * rng.standard_normal((2, SIMULATIONS, seeds, 1)))
    noise = 0.02 * rng.standard_normal((2, SIMULATIONS, seeds, len(COMPUTE)))
    reference = sigmoid_rewards(COMPUTE, 0.6, 60 * luck[0], 1.3, 0.2) + noise[0]
    arm = sigmoid_rewards(COMPUTE, 0.6, 40 * luck[1], 1.3, 0.2) + noise[1]
    ratio = speed_up((COMPUTE, reference), (COMPUTE, arm), share=share).ratio
    assert within(ratio.covers(1.5).mean())
    assert np.median(ratio.value) == pytest.approx(1.5, rel=0.03)


def test_arms_of_equal_speed_give_no_claim_and_other_units_count() -> None:
    rng = np.random.default_rng(0)
    both = sigmoid_rewards(COMPUTE, 0.6, 50.0, 1.3, 0.2) + 0.02 * rng.standard_normal((2, SIMULATIONS, 5, len(COMPUTE)))
    ratio = speed_up((COMPUTE, both[0]), (COMPUTE, both[1])).ratio
    assert within(1 - ratio.excludes(1.0).mean())
    faster = speed_up((COMPUTE, both[0]), (np.tile(COMPUTE / 2, (5, 1)), both[1])).ratio
    assert np.allclose(faster.value, 2 * ratio.value)


def test_one_seed_has_no_interval_and_falling_curves_no_speed_up() -> None:
    rising = np.linspace(0.2, 0.6, 16)
    alone = speed_up((COMPUTE, rising[None]), (COMPUTE, rising[None])).ratio
    assert alone.value == pytest.approx(1.0)
    assert (alone.low, alone.high) == (0.0, pytest.approx(np.exp(700)))
    assert np.isnan(speed_up((COMPUTE, rising[None]), (COMPUTE, rising[None, ::-1])).ratio.value)


def test_isotonic_regression_is_scipys() -> None:
    y = np.random.default_rng(0).standard_normal((30, 17))
    assert np.allclose(isotonic(y), [isotonic_regression(row).x for row in y])


def test_compute_to_reach_interpolates() -> None:
    assert compute_to_reach(np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.4, 0.6]), np.array(0.5)) == 15.0
    assert np.isnan(compute_to_reach(np.array([0.0, 10.0]), np.array([0.0, 0.4]), np.array(0.5)))


def test_the_break_even_covers_the_truth_also_where_it_is_hardly_there() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.uniform(1e5, 1e6, (2, 40))
    for noise in (0.1, 1.5):
        slow = 1 + 1.0e-5 * tokens[0] + noise * rng.standard_normal((SIMULATIONS, 40))
        fast = 3 + 0.6e-5 * tokens[1] + noise * rng.standard_normal((SIMULATIONS, 40))
        found = break_even((tokens[0], tokens[1]), (slow, fast))
        assert within(found.covers(2 / 0.4e-5).mean())
    equal = break_even((tokens[0], tokens[1]), (slow, 3 + 1.0e-5 * tokens[1] + rng.standard_normal((SIMULATIONS, 40))))
    assert within(np.isinf(equal.high).mean()), "equal slopes never meet, which 95 % of the intervals say"

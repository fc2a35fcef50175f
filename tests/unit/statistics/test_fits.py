import numpy as np
import pytest
from scipy.optimize import least_squares

from megatron_rl.errors import UserError
from megatron_rl.statistics.nested import NestedFits, nested_fits
from megatron_rl.statistics.paired import seed_difference
from megatron_rl.statistics.power_law import fit_power_law, log_slope
from megatron_rl.statistics.sigmoid import fit_sigmoid
from tests.unit.statistics.coverage import LEVEL, SIMULATIONS, sigmoid_rewards, within

COMPUTE = np.geomspace(5, 300, 20)


def curves(rng: np.random.Generator, noise: float, top: float = 0.6, middle: float = 40.0) -> np.ndarray:
    truth = sigmoid_rewards(COMPUTE, top, middle, 1.5, 0.2)
    return truth + noise * rng.standard_normal((SIMULATIONS, len(COMPUTE)))


def test_the_profile_interval_covers_the_ceiling_and_the_fit_recovers_the_curve() -> None:
    found = fit_sigmoid(COMPUTE, curves(np.random.default_rng(0), 0.01), 0.2)
    assert within(found.ceiling.covers(0.6).mean())
    assert found.identified.all()
    assert np.median(found.ceiling.value) == pytest.approx(0.6, abs=0.002)
    assert np.median(found.midpoint) == pytest.approx(40, rel=0.02)
    assert np.median(found.steepness) == pytest.approx(1.5, rel=0.02)


def test_a_curve_that_has_not_bent_has_no_ceiling() -> None:
    rng = np.random.default_rng(0)
    straight = sigmoid_rewards(COMPUTE, 0.8, 600.0, 1.0, 0.2) + 0.01 * rng.standard_normal((200, 20))
    found = fit_sigmoid(COMPUTE, straight, 0.2)
    assert not found.identified.any()
    assert within(fit_sigmoid(COMPUTE, curves(rng, 0.01, middle=100.0), 0.2).ceiling.covers(0.6).mean())


def test_the_fit_is_as_good_as_scipys() -> None:
    y = curves(np.random.default_rng(3), 0.02)[:20]
    ours = fit_sigmoid(COMPUTE, y, 0.2).fit.sse
    for row, sse in zip(y, ours, strict=True):
        theirs = least_squares(
            lambda t, row=row: row - sigmoid_rewards(COMPUTE, t[0], np.exp(t[1]), np.exp(t[2]), 0.2),
            (0.6, np.log(40), np.log(1.5)),
            bounds=([0, 0, np.log(0.2)], [1, 9, np.log(8)]),
        )
        assert sse <= 2 * theirs.cost * (1 + 1e-4)


def test_weights_count_good_points_more() -> None:
    rng = np.random.default_rng(0)
    se = np.where(np.arange(20) % 2, 0.003, 0.05)
    y = sigmoid_rewards(COMPUTE, 0.6, 40.0, 1.5, 0.2) + se * rng.standard_normal((SIMULATIONS, 20))
    weighted, plain = fit_sigmoid(COMPUTE, y, 0.2, se=se), fit_sigmoid(COMPUTE, y, 0.2)
    assert weighted.ceiling.value.std() < 0.5 * plain.ceiling.value.std()
    assert within(weighted.ceiling.covers(0.6).mean())


def test_points_of_one_run_that_move_together_need_seeds() -> None:
    """The negative control: a profile of one curve knows nothing of what a seed adds to all of its points."""
    rng = np.random.default_rng(0)
    truth = sigmoid_rewards(COMPUTE, 0.6, 40.0, 1.5, 0.2)
    luck = 0.02 * rng.standard_normal((400, 5, 1)) * np.linspace(0, 1, 20)
    found = fit_sigmoid(COMPUTE, truth + luck + 0.005 * rng.standard_normal((400, 5, 20)), 0.2)
    assert found.ceiling.covers(0.6)[:, 0].mean() < 0.7
    assert seed_difference(found.ceiling.value).covers(0.6).mean() > 0.92


def test_too_few_points_are_refused() -> None:
    with pytest.raises(UserError, match="at least 5 points"):
        fit_sigmoid(COMPUTE[:4], np.zeros(4), 0.0)


def two_arms(middle: float, top: float, simulations: int) -> NestedFits:
    rng = np.random.default_rng(0)
    arms = np.stack([sigmoid_rewards(COMPUTE, *arm, 1.5, 0.2) for arm in ((0.6, 40.0), (top, middle))])
    y = arms + 0.015 * rng.standard_normal((simulations, 2, 20))
    return nested_fits(COMPUTE, y, np.full((simulations, 2), 0.2))


def test_equal_arms_differ_neither_in_ceiling_nor_in_efficiency() -> None:
    found = two_arms(40.0, 0.6, SIMULATIONS)
    for p in (found.p_efficiency, found.p_ceiling):
        assert (p < 0.05).mean() <= LEVEL + 0.01  # the F test is exact for linear fits alone
    assert (found.best == 0).mean() > 0.75


def test_a_slower_arm_and_an_arm_with_another_ceiling_are_told_apart() -> None:
    slower = two_arms(80.0, 0.6, 300)
    assert (slower.p_efficiency < 0.05).mean() > 0.95
    assert (slower.p_ceiling < 0.05).mean() < 0.1
    assert (slower.best == 1).mean() > 0.75
    higher = two_arms(40.0, 0.7, 300)
    assert (higher.p_ceiling < 0.05).mean() > 0.95
    assert (higher.best == 2).mean() > 0.95


@pytest.mark.parametrize(("limit", "factor", "alpha"), [(0.01, 50.0, 0.5), (0.02, 1.0, 0.2), (0.5, 3e-5, -0.4)])
def test_a_power_law_is_recovered(limit: float, factor: float, alpha: float) -> None:
    rng = np.random.default_rng(0)
    x = np.geomspace(1e6, 1e9, 10)
    truth = limit + factor * x**-alpha
    found = fit_power_law(x, truth + 0.02 * np.ptp(truth) * rng.standard_normal((SIMULATIONS, 10)))
    assert within(found.exponent.covers(alpha).mean())
    assert np.median(found.exponent.value) == pytest.approx(alpha, abs=0.03)
    assert np.median(found.limit) == pytest.approx(limit, abs=0.05 * np.ptp(truth))
    assert (found.p < 0.001).all()
    assert np.median(found.hold_out) < np.median(found.hold_out_constant)


def test_no_dependence_on_size_is_claimed_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    found = fit_power_law(np.geomspace(1e6, 1e9, 10), 0.03 + 0.003 * rng.standard_normal((SIMULATIONS, 10)))
    assert (found.p < 0.05).mean() <= LEVEL + 0.01  # the exponent is searched, so F is approximate


def test_a_power_law_of_three_sizes_is_refused() -> None:
    with pytest.raises(UserError, match="at least 4 different positive sizes, but there are 3"):
        fit_power_law(np.array([1.0, 1.0, 2.0, 4.0]), np.zeros(4))


def test_growth_along_correlated_runs_is_covered_by_seeds_and_not_by_a_regression() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(1, 41.0)
    error = 0.3 * rng.standard_normal((SIMULATIONS, 5, 40))
    for at in range(1, 40):
        error[..., at] += 0.8 * error[..., at - 1]
    y = np.exp(0.4 * np.log(steps) + error)
    assert within(log_slope(steps, y).covers(0.4).mean())
    x = np.tile(np.log(steps) - np.log(steps).mean(), 5)
    flat = np.log(y).reshape(SIMULATIONS, -1)
    slope = flat @ x / (x @ x)
    rest = flat - flat.mean(1, keepdims=True) - slope[:, None] * x
    se = np.sqrt((rest**2).sum(1) / 198 / (x @ x))
    assert (np.abs(slope - 0.4) < 1.97 * se).mean() < 0.8

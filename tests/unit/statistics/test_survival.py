import numpy as np
import pytest
from scipy import stats

from megatron_rl.errors import UserError
from megatron_rl.statistics.survival import (
    collapse_difference,
    collapse_index,
    collapse_share,
    kaplan_meier,
    zero_events_bound,
)
from tests.unit.statistics.coverage import LEVEL, SIMULATIONS, within

SAMPLES = 200


def rewards(rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pass rates of SAMPLES responses, and their standard errors."""
    drawn = np.random.default_rng(0).binomial(SAMPLES, np.broadcast_to(rate, (SIMULATIONS, len(rate)))) / SAMPLES
    mean = drawn.mean(-1, keepdims=True)
    return drawn, np.sqrt(mean * (1 - mean) / SAMPLES)


def test_a_planted_collapse_is_found_at_its_step() -> None:
    drawn, noise = rewards(np.where(np.arange(30) < 18, 0.4, 0.1))
    assert (collapse_index(drawn, noise=noise) == 18).mean() > 0.99


@pytest.mark.parametrize("level", [0.03, 0.05, 0.2, 0.5])
def test_noise_alone_is_no_collapse(level: float) -> None:
    drawn, noise = rewards(np.full(30, level))
    assert (collapse_index(drawn, noise=noise) >= 0).mean() < 0.02
    naive = collapse_index(drawn, noise=0.0) >= 0
    assert level > 0.05 or naive.mean() > 0.1, "without the noise rule small rewards seem to collapse"


def test_a_slow_decline_by_a_third_is_no_collapse() -> None:
    drawn, noise = rewards(np.linspace(0.6, 0.4, 30))
    assert (collapse_index(drawn, noise=noise) >= 0).mean() < 0.001


def test_two_bad_evaluations_are_no_collapse_but_a_broken_number_is_one() -> None:
    reward = np.full(10, 0.5)
    dip = reward.copy()
    dip[4:6] = 0.1
    assert collapse_index(dip, noise=0.01) == -1
    dip[6] = 0.1
    assert collapse_index(dip, noise=0.01) == 4
    reward[7] = np.nan
    assert collapse_index(reward, noise=0.01) == 7


def test_a_negative_reward_has_no_half() -> None:
    assert collapse_index(np.linspace(-1.0, -3.0, 10), noise=0.01) == -1


def test_kaplan_meier_gives_worked_numbers() -> None:
    found = kaplan_meier(np.array([6, 6, 6, 7, 10, 13]), np.array([True, True, False, True, False, True]))
    # 4/6 after 6; times 2/3 after 7; unchanged after 10; 0 after 13
    assert np.allclose(found.share, [4 / 6, 4 / 9, 4 / 9, 0])
    greenwood = (4 / 6) * np.sqrt(2 / (6 * 4))
    theta = stats.norm.ppf(0.975) * greenwood / ((4 / 6) * np.log(4 / 6))
    assert np.allclose([found.low[0], found.high[0]], sorted((4 / 6) ** np.exp([theta, -theta])))


@pytest.mark.parametrize("runs", [20, 50])
def test_the_interval_of_survival_covers_the_truth(runs: int) -> None:
    rng = np.random.default_rng(runs)
    covered = []
    for _ in range(SIMULATIONS):
        end, event = rng.uniform(10, 60, runs), rng.exponential(30, runs)
        found = kaplan_meier(np.minimum(end, event), event <= end)
        at = np.searchsorted(found.times, 20.0, side="right") - 1
        covered.append(at < 0 or found.low[at] <= np.exp(-20 / 30) <= found.high[at])
    assert within(np.mean(covered))


def test_the_exact_share_covers_at_least_its_confidence_with_few_runs() -> None:
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.3, 0.5):
        counts = rng.binomial(5, rate, SIMULATIONS)
        intervals = [collapse_share(count, 5) for count in range(6)]
        assert np.mean([intervals[count].covers(rate) for count in counts]) > 0.94


def test_no_event_in_n_runs_bounds_the_share() -> None:
    assert zero_events_bound(5) == pytest.approx(1 - 0.05**0.2)
    assert zero_events_bound(100) == pytest.approx(0.03, abs=0.001)  # about 3 / n


def test_arms_that_collapse_equally_often_are_rarely_called_different() -> None:
    p = np.array([[collapse_difference((first, 5), (second, 5)) for first in range(6)] for second in range(6)])
    first, second = np.random.default_rng(0).binomial(5, 0.4, (2, SIMULATIONS))
    assert (p[first, second] < 0.05).mean() <= LEVEL
    assert p[0, 5] == pytest.approx(2 / 252)


def test_no_runs_are_refused() -> None:
    with pytest.raises(UserError, match="at least one run"):
        kaplan_meier(np.array([]), np.array([]))

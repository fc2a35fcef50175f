import numpy as np
import pytest

from megatron_rl.statistics.variance import seed_sd, variance_components
from tests.unit.statistics.coverage import SIMULATIONS, within


def test_components_are_recovered() -> None:
    rng = np.random.default_rng(0)

    def part(sd: float, *shape: int) -> np.ndarray:
        return sd * rng.standard_normal((SIMULATIONS, *shape))

    y = part(0.06, 4, 1, 1) + part(0.05, 1, 6, 1) + part(0.3, 1, 1, 30) + part(0.1, 4, 1, 30) + part(0.2, 4, 6, 30)
    found = variance_components(y, sampling=0.03)
    truth = {"arm": 0.06, "seed": 0.05, "prompt": 0.3, "arm_prompt": 0.1, "rest": 0.2}
    for name, sd in truth.items():
        # Negative components are set to zero, which makes the small ones a little too large on average.
        assert getattr(found, name).mean() == pytest.approx(sd**2, rel=0.1)
    shares = found.shares()
    assert np.allclose(sum(shares.values()), 1)
    total = 0.06**2 + 0.05**2 + 0.3**2 + 0.1**2 + 0.2**2
    assert shares["sampling"].mean() == pytest.approx(0.03 / total, rel=0.05)


def test_arms_that_do_not_differ_have_almost_no_share() -> None:
    rng = np.random.default_rng(0)
    y = 0.3 * rng.standard_normal((SIMULATIONS, 1, 1, 30)) + 0.2 * rng.standard_normal((SIMULATIONS, 4, 5, 30))
    assert variance_components(y).shares()["arm"].mean() < 0.005


def test_the_interval_of_the_spread_over_seeds_covers_it() -> None:
    values = 0.03 * np.random.default_rng(0).standard_normal((SIMULATIONS, 5))
    assert within(seed_sd(values).covers(0.03).mean())

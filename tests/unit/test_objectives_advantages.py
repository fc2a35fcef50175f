import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import group_advantages

REWARDS = np.array([1, 0, 5, 0, 0, 2.0])
GROUPS = np.array([9, 4, 9, 9, 4, -1])


def test_mean_advantages_are_centred_within_each_group_in_any_order():
    out = group_advantages(REWARDS, GROUPS, "mean")
    np.testing.assert_allclose(out, [-1, 0, 3, -2, 0, 0])
    assert out.dtype == np.float32


def test_grpo_advantages_are_divided_by_the_unbiased_deviation_and_a_group_of_one_is_kept():
    std = np.std([1, 5, 0], ddof=1) + 1e-6
    np.testing.assert_allclose(
        group_advantages(REWARDS, GROUPS, "grpo"), [-1 / std, 0, 3 / std, -2 / std, 0, 2 / (1 + 1e-6)], rtol=1e-6
    )


@given(st.floats(-100, 100), st.integers(2, 9), st.sampled_from(["mean", "grpo"]))
def test_equal_rewards_give_exact_zeros(reward, size, kind):
    assert not group_advantages(np.full(size, reward), np.zeros(size), kind).any()


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16), st.floats(0.5, 50))
def test_mean_advantages_sum_to_zero_and_grpo_advantages_do_not_know_the_reward_scale(rewards, scale):
    rewards, groups = np.array(rewards), np.zeros(len(rewards), dtype=int)
    assert group_advantages(rewards, groups, "mean").sum() == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(
        group_advantages(rewards * scale, groups, "grpo"), group_advantages(rewards, groups, "grpo"), atol=2e-5
    )


def test_bad_rewards_are_refused_by_trajectory():
    with pytest.raises(UserError, match="trajectory 1"):
        group_advantages(np.array([0, np.nan]), np.array([0, 0]), "mean")
    with pytest.raises(UserError, match="one shape"):
        group_advantages(np.zeros(3), np.zeros(2), "mean")
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        group_advantages(np.zeros(2), np.zeros(2), "men")

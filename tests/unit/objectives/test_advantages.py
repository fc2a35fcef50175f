import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives import group_advantages
from megatron_rl.objectives.advantages import overlong_penalty, whiten_tokens

REWARDS = np.array([1, 0, 5, 0, 0, 2.0])
GROUPS = np.array([9, 4, 9, 9, 4, -1])


def test_mean_advantages_are_centered_within_each_group_in_any_order():
    out = group_advantages(REWARDS, GROUPS, "mean")
    np.testing.assert_allclose(out, [-1, 0, 3, -2, 0, 0])
    assert out.dtype == np.float32


def test_grpo_advantages_are_divided_by_the_unbiased_deviation_and_a_group_of_one_is_kept():
    std = np.std([1, 5, 0], ddof=1) + 1e-6
    np.testing.assert_allclose(
        group_advantages(REWARDS, GROUPS, "grpo"), [-1 / std, 0, 3 / std, -2 / std, 0, 2 / (1 + 1e-6)], rtol=1e-6
    )


@given(st.floats(-100, 100), st.integers(2, 9), st.sampled_from(["mean", "grpo", "rloo", "dr_grpo", "whiten"]))
def test_equal_rewards_give_exact_zeros(reward, size, kind):
    assert not group_advantages(np.full(size, reward), np.zeros(size), kind).any()


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16), st.floats(0.5, 50))
def test_mean_advantages_sum_to_zero_and_grpo_advantages_do_not_know_the_reward_scale(rewards, scale):
    rewards, groups = np.array(rewards), np.zeros(len(rewards), dtype=int)
    assert group_advantages(rewards, groups, "mean").sum() == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(
        group_advantages(rewards * scale, groups, "grpo"), group_advantages(rewards, groups, "grpo"), atol=2e-5
    )


def test_rloo_subtracts_the_mean_of_the_others_and_a_group_of_one_has_none():
    np.testing.assert_allclose(group_advantages(REWARDS, GROUPS, "rloo"), [1 - 2.5, 0, 5 - 0.5, 0 - 3, 0, 0])


def test_dr_grpo_is_the_centered_reward():
    assert (group_advantages(REWARDS, GROUPS, "dr_grpo") == group_advantages(REWARDS, GROUPS, "mean")).all()


def test_whitened_advantages_are_centered_in_the_group_and_scaled_by_the_batch():
    centered = group_advantages(REWARDS, GROUPS, "mean")
    whitened = group_advantages(REWARDS, GROUPS, "whiten")
    np.testing.assert_allclose(whitened, centered / centered.std(ddof=1), rtol=1e-6)
    assert not group_advantages(np.array([7.0]), np.array([0]), "whiten").any(), "a batch of one has no deviation"


raws = st.lists(st.floats(-10, 10), min_size=2, max_size=20).filter(lambda values: max(values) - min(values) > 0.1)


@given(raws, st.floats(0.5, 20), st.floats(-5, 5), st.integers(0, 5))
def test_whitened_tokens_have_mean_0_and_deviation_1_whatever_the_scale_and_the_padding(raw, scale, shift, padding):
    mask = np.concatenate([np.ones(len(raw)), np.zeros(padding)])
    padded = np.concatenate([raw, np.full(padding, np.nan)])
    out = whiten_tokens(padded, mask)
    assert out.dtype == np.float64
    assert not out[len(raw) :].any()
    trained = out[: len(raw)]
    assert trained.mean() == pytest.approx(0, abs=1e-9)
    assert trained.std(ddof=1) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(whiten_tokens(scale * padded + shift, mask), out, atol=1e-4)


@given(st.floats(-1e6, 1e6), st.integers(0, 9))
def test_equal_tokens_are_whitened_to_exact_zeros(value, size):
    assert not whiten_tokens(np.full(size, value), np.ones(size)).any()


def test_whitening_refuses_what_it_cannot_average():
    with pytest.raises(UserError, match=r"raw\[1\] is nan"):
        whiten_tokens(np.array([0, np.nan, 1]), np.ones(3))
    with pytest.raises(UserError, match="one shape"):
        whiten_tokens(np.zeros(3), np.ones(2))


def test_the_overlong_penalty_falls_linearly_over_the_buffer():
    lengths = np.array([0, 80, 81, 90, 100, 130])
    np.testing.assert_allclose(overlong_penalty(lengths, 100, 20), [0, 0, -0.05, -0.5, -1, -1])
    np.testing.assert_allclose(overlong_penalty(lengths, 100, 20, penalty=0.5), [0, 0, -0.025, -0.25, -0.5, -0.5])


@pytest.mark.parametrize("buffer", [0, 101])
def test_an_overlong_buffer_lies_within_the_longest_response(buffer):
    with pytest.raises(ConfigError, match="overlong buffer"):
        overlong_penalty(np.array([1]), 100, buffer)


def test_bad_rewards_are_refused_by_trajectory():
    with pytest.raises(UserError, match="trajectory 1"):
        group_advantages(np.array([0, np.nan]), np.array([0, 0]), "mean")
    with pytest.raises(UserError, match="one shape"):
        group_advantages(np.zeros(3), np.zeros(2), "mean")
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        group_advantages(np.zeros(2), np.zeros(2), "men")

"""The statistics of ERPD have the values and properties that are worked out here (arXiv 2605.25582)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.algorithms.erpd.statistics import (
    SHIFT_EDGES,
    explained_variance,
    kl_to_old,
    negative_on_positives,
    raw_signal,
    shift_table,
)
from megatron_rl.objectives import LossInputs
from megatron_rl.objectives.advantages import whiten_tokens
from megatron_rl.objectives.erpd import ErpdMSE

FLOOR = -20.0
LOGOLD = np.array([-0.2, -1, -0.5, -0.8, -0.1, -2])
LOGE = np.array([-0.1, -0.6, -0.7, -1.4, -0.3, -4])
LOGUN = np.array([-0.6, -1.9, -0.4, -0.9, -0.2, -1.8])
REWARDS = np.array([1.0, 1, 1, 0, 0, 0])  # of each token's trajectory
ALL = np.ones(6, dtype=bool)

logprobs = st.lists(st.floats(-15, -1e-3), min_size=3, max_size=30).map(np.array)


def test_the_signal_of_the_old_policy_in_worked_numbers():
    raw = raw_signal(LOGE, LOGOLD, FLOOR)
    np.testing.assert_allclose(raw, [0.1, 0.4, -0.2, -0.6, -0.2, -2], atol=1e-12)
    expected = [0.611593, 0.966712, 0.256475, -0.217017, 0.256475, -1.874238]
    np.testing.assert_allclose(whiten_tokens(raw, ALL), expected, atol=1e-6)


def test_the_signal_of_an_unlearned_policy_in_worked_numbers():
    raw = raw_signal(LOGE, LOGUN, FLOOR)
    np.testing.assert_allclose(raw, [0.5, 1.3, -0.3, -0.5, -0.1, -2.2], atol=1e-12)
    np.testing.assert_allclose(negative_on_positives(raw, REWARDS), [0, 0, -0.3, -0.5, -0.1, -2.2], atol=1e-12)


def test_a_reward_of_one_half_is_positive_here_as_it_is_for_the_teacher():
    assert negative_on_positives(np.ones(3), np.array([0.49, 0.5, 0.51])).tolist() == [1, 0, 0]
    inputs = LossInputs(logp=-torch.ones(1, 3), mask=torch.ones(1, 3), rewards=torch.tensor([[0.49, 0.5, 0.51]]))
    assert ErpdMSE().per_token(inputs).metrics["erpd_mse/positives"].tolist() == [[0, 1, 1]]


@given(logprobs)
def test_a_teacher_that_is_its_own_denominator_says_nothing(logp):
    whitened = whiten_tokens(raw_signal(logp, logp, FLOOR), np.ones(len(logp), dtype=bool))
    assert whitened.tolist() == [0.0] * len(logp)


@given(logprobs, logprobs, logprobs)
def test_the_signal_against_an_unlearned_policy_is_the_difference_of_two_signals_against_the_old_one(
    loge, logun, logold
):
    size = min(map(len, (loge, logun, logold)))
    loge, logun, logold = loge[:size], logun[:size], logold[:size]
    both = raw_signal(loge, logold, FLOOR) - raw_signal(logun, logold, FLOOR)
    np.testing.assert_allclose(raw_signal(loge, logun, FLOOR), both, atol=1e-9)


def test_a_saturated_teacher_is_floored():
    raw = raw_signal(np.array([-np.inf, -50.0, -1.0]), np.array([-1.0, -2.0, -2.0]), FLOOR)
    assert raw.tolist() == [-19.0, -18.0, 1.0]
    assert raw_signal(np.array([-np.inf]), np.array([-np.inf]), FLOOR).tolist() == [0.0]


def test_the_reverse_kl_is_that_of_the_distributions_when_tokens_are_drawn_from_the_old_one():
    """The estimate is exact if each token occurs as often as the old policy draws it."""
    counts = np.array([5, 3, 2])
    old, new = counts / 10, np.array([0.2, 0.3, 0.5])
    logold, logp = np.repeat(np.log(old), counts), np.repeat(np.log(new), counts)
    assert kl_to_old(logp, logold, np.ones(10, dtype=bool)) == pytest.approx(
        float((new * np.log(new / old)).sum()), rel=1e-12
    )
    assert kl_to_old(logold, logold, np.ones(10, dtype=bool)) == 0


def test_tokens_that_are_not_trained_count_nowhere():
    trained = np.array([True, True, False, True, True, True])
    spoilt = np.where(trained, LOGE, 7.0)
    for value in (kl_to_old, lambda a, b, t: shift_table(a, LOGOLD, b, t).count.tolist()):
        assert value(LOGE, LOGOLD, trained) == value(spoilt, LOGOLD, trained)
    assert explained_variance(LOGE, REWARDS, trained) == explained_variance(spoilt, REWARDS, trained)


def test_the_explained_variance_is_1_for_a_perfect_teacher_0_for_an_indifferent_one_and_undefined_without_variance():
    with np.errstate(divide="ignore"):
        assert explained_variance(np.log(REWARDS), REWARDS, ALL) == 1
    assert explained_variance(np.full(6, math.log(0.3)), REWARDS, ALL) == pytest.approx(0)
    assert math.isnan(explained_variance(LOGE, np.ones(6), ALL))


def test_the_shift_table_counts_every_token_once_and_measures_how_far_the_student_followed():
    logold = np.full(5, -1.0)
    teacher = np.array([0.0, 0.2, -0.2, 0.2, 5.0])
    student = np.array([0.4, 0.1, 0.2, 0.0, -2.5])
    table = shift_table(logold + teacher, logold, logold + student, np.ones(5, dtype=bool))
    at = {edge: i for i, edge in enumerate(SHIFT_EDGES)}
    assert table.count.sum() == 5
    assert (table.count[at[0.0]], table.count[at[0.1]], table.count[at[3.0]]) == (1, 3, 1)
    assert table.mean[at[0.1]] == pytest.approx(0.5) and table.median[at[0.1]] == pytest.approx(0.5)
    assert table.mean[at[3.0]] == pytest.approx(0.5)
    assert math.isnan(table.mean[at[0.0]]), "a token the teacher left alone has no ratio"


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(4))
def test_in_a_table_of_softmaxes_the_student_gains_reward_at_less_divergence_than_its_teacher(seed):
    """There are 8 contexts and 6 responses.

    The teacher is fitted to outcomes on samples of the old policy. The student is distilled from the teacher.
    """
    rng = np.random.default_rng(seed)
    old_logits = rng.normal(size=(8, 6))
    old = softmax(old_logits)
    right = rng.random((8, 6)) < 0.35
    context = np.repeat(np.arange(8), 300)
    token = np.concatenate([rng.choice(6, 300, p=p) for p in old])
    reward, trained = right[context, token].astype(float), np.ones(len(token), dtype=bool)
    logold = np.log(old[context, token])

    def logp_of(logits: np.ndarray) -> np.ndarray:
        return np.log(softmax(logits)[context, token])

    def ascend(logits: np.ndarray, push: np.ndarray, rate: float) -> np.ndarray:
        """Return the logits after one gradient ascent step on the sampled sum of push x dlogp."""
        gradient = np.zeros_like(logits)
        np.add.at(gradient, (context, token), push)
        gradient -= softmax(logits) * np.bincount(context, push)[:, None]
        return logits + rate * gradient / len(token)

    teacher = old_logits
    for _ in range(300):  # outcome regression: dloss/dlogp = 2 (pi - R) pi
        probability = np.exp(logp_of(teacher))
        teacher = ascend(teacher, -2 * (probability - reward) * probability, 4.0)
    advantages = whiten_tokens(raw_signal(logp_of(teacher), logold, FLOOR), trained)
    student = old_logits
    for _ in range(5):
        ratio = np.exp(logp_of(student) - logold)
        open_ = ~(((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8)))
        student = ascend(student, advantages * ratio * open_, 0.5)

    def divergence(logits: np.ndarray) -> float:
        new = softmax(logits)
        return float((new * np.log(new / old)).sum(axis=1).mean())

    def expected_reward(probabilities: np.ndarray) -> float:
        return float((probabilities * right).sum(axis=1).mean())

    assert 0 < divergence(student) < 0.5 * divergence(teacher)
    assert expected_reward(softmax(student)) > expected_reward(old) + 0.01
    assert kl_to_old(logp_of(student), logold, trained) == pytest.approx(divergence(student), rel=0.3)

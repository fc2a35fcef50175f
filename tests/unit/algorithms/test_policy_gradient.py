"""The first update of a step computes the old log-probabilities of its own batch, if nothing perturbs its pass."""

import numpy as np
import pytest

from megatron_rl.algorithms.policy_gradient import scored_parts
from megatron_rl.errors import UserError
from megatron_rl.objectives import make_objective
from tests.parallel.refusal_steps import digest
from tests.parallel.steps import make_batch, make_policy

BATCH = make_batch()
OLD = {"name": "grpo", "ratio_denominator": "trainer_old"}
WEIGHED = OLD | {"corrections": [{"name": "tis", "threshold": 2.0, "level": "token"}]}


def policy_of(model, updates=0):
    """Return a policy after some updates of another objective."""
    policy = make_policy(model, {}, optimizer={"lr": 1e-3})
    for _ in range(updates):
        objective = make_objective({"name": "grpo"})
        policy.update(BATCH, objective, objective.norm)
    return policy


@pytest.mark.parametrize("method", [OLD, WEIGHED], ids=["old", "old_with_tis"])
def test_own_log_probabilities_are_those_of_a_pass_before_the_update(qwen3, method):
    objective = make_objective(method)
    scored, own = policy_of(qwen3), policy_of(qwen3)
    before = scored.update(BATCH.with_columns(logold=scored.logprobs(BATCH)), objective, objective.norm)
    stats = own.update(BATCH, objective, objective.norm, own_logold=True)
    assert digest(own) == digest(scored)
    assert (stats.loss, stats.grad_norm) == (before.loss, before.grad_norm) and stats.metrics == before.metrics


def test_a_later_update_with_its_own_log_probabilities_would_be_another_one(qwen3):
    objective = make_objective(OLD)
    scored, own = policy_of(qwen3), policy_of(qwen3)
    batch = BATCH.with_columns(logold=scored.logprobs(BATCH))
    for _ in range(2):
        scored.update(batch, objective, objective.norm)
        own.update(BATCH, objective, objective.norm, own_logold=True)
    assert digest(own) != digest(scored)


@pytest.mark.parametrize("updates", [1, 3, 4])
def test_only_the_parts_after_the_first_are_scored(qwen3, updates):
    policy = policy_of(qwen3, updates=1)
    needs = make_objective(OLD).needs
    every = scored_parts(policy, BATCH, needs, updates, own_logold=False)
    parts = scored_parts(policy, BATCH, needs, updates, own_logold=True)
    assert parts[0].logold is None and len(parts) == updates
    for part, same in zip(parts, every, strict=True):
        np.testing.assert_array_equal(part.ids, same.ids)
    for part, same in zip(parts[1:], every[1:], strict=True):
        np.testing.assert_allclose(part.logold, same.logold, atol=1e-5)


def test_an_objective_that_needs_old_log_probabilities_gets_none_unasked(qwen3):
    objective = make_objective(OLD)
    with pytest.raises(UserError, match="logold"):
        policy_of(qwen3).update(BATCH, objective, objective.norm)

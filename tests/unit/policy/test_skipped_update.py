"""An update from which nothing can be learnt leaves the policy and the optimizer as they are."""

import numpy as np
import pytest

from megatron_rl.objectives import make_objective
from megatron_rl.types import Batch
from tests.parallel.refusal_steps import digest
from tests.parallel.steps import make_batch, make_policy

BATCH = make_batch()
NOTHING = {
    "no token is trained": {"mask": np.zeros_like(BATCH.mask)},
    "every advantage is 0": {"advantages": np.zeros_like(BATCH.advantages)},
}


@pytest.fixture(scope="module")
def policy(qwen3):
    """A policy whose optimizer has momentum."""
    policy = make_policy(qwen3, {}, optimizer={"lr": 1e-3, "warmup_updates": 8})
    before = digest(policy)
    assert update(policy, BATCH).grad_norm > 0 and digest(policy) != before
    return policy


def update(policy, batch: Batch):
    """Make one update."""
    objective = make_objective({"name": "grpo"})
    return policy.update(batch, objective, objective.norm)


@pytest.mark.parametrize("columns", NOTHING.values(), ids=NOTHING)
def test_momentum_does_not_move_the_weights_of_an_update_without_a_gradient(policy, columns):
    """As in https://github.com/redai-studio/Relax/pull/285."""
    before, updates, lr = digest(policy), policy.optimizer.updates, policy.optimizer.lr
    assert update(policy, BATCH.with_columns(**columns)).grad_norm == 0
    assert (digest(policy), policy.optimizer.updates, policy.optimizer.lr) == (before, updates, lr)


def test_the_next_update_with_a_gradient_is_made(policy):
    before, updates = digest(policy), policy.optimizer.updates
    update(policy, BATCH)
    assert digest(policy) != before and policy.optimizer.updates == updates + 1

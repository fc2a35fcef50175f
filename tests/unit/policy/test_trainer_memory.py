"""Freed memory of the trainer comes back as it was: the next update equals that of a trainer that kept it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.trainer_memory import TrainerMemory
from tests.parallel.steps import OBJECTIVE, make_batch, make_policy

# Bytes of a parameter: gradient, and moments; in 16-bit training the master weight, too.
FREED = {"fp32": 4 + 8, "bf16": 4 + 4 + 8}


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.models[0].named_parameters()}


def updated(folder: Path, train: str, distributed: bool, *, turns: bool) -> dict[str, Any]:
    """Make two updates, with the memory freed between them if `turns`. Return the weights and what was freed."""
    sections = {"precision": {"train": train}, "optimizer": {"distributed": distributed}}
    policy = make_policy(folder, {}, **sections)
    batch, objective = make_batch(), make_objective(OBJECTIVE)
    policy.update(batch, objective, objective.norm)
    found: dict[str, Any] = {}
    if turns:
        memory = TrainerMemory(policy.chunks, policy.optimizer.core)
        count = sum(parameter.numel() for parameter in policy.models[0].parameters())
        found = {"each": memory.release() / count, "again": memory.release(), "held": memory.held}
        policy.logprobs(batch)  # parameters are there
        memory.restore()
    stats = policy.update(batch, objective, objective.norm)
    return found | {"weights": weights(policy), "norm": stats.grad_norm}


@pytest.mark.parametrize(("train", "distributed"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_freed_memory_is_that_of_gradients_masters_and_moments_and_comes_back(
    qwen3: Path, train: str, distributed: bool
):
    kept, freed = (updated(qwen3, train, distributed, turns=turns) for turns in (False, True))
    assert freed["each"] == pytest.approx(FREED[train], rel=0.01) and freed["again"] == 0 and not freed["held"]
    assert kept["norm"] == freed["norm"]
    assert all(torch.equal(kept["weights"][name], value) for name, value in freed["weights"].items())

"""Tensors are freed when they are no longer used. None waits in a cycle for Python's collector, which may run late."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import Policy
from megatron_rl.policy.checkpoint import Checkpoints
from megatron_rl.policy.checkpoint_state import TrainState
from tests.parallel.steps import OBJECTIVE, make_batch, make_policy


def save(policy: Policy, folder: Path) -> None:
    with Checkpoints(folder / "checkpoints", policy, keep=2) as checkpoints:
        checkpoints.save(TrainState(seed=0, step=1), wait=True)


def load(policy: Policy, folder: Path) -> None:
    with Checkpoints(folder / "checkpoints", policy, keep=2) as checkpoints:
        checkpoints.load(1)


def update(policy: Policy, _: Path) -> None:
    objective = make_objective(OBJECTIVE)
    policy.update(make_batch(), objective, objective.norm)


WORK: dict[str, Callable[[Policy, Path], object]] = {
    "update": update,
    "logprobs": lambda policy, _: policy.logprobs(make_batch()),
    "save": save,
    "load": load,
    "export": lambda policy, _: [tensor for _, tensor in policy.export()],
    "copy": lambda policy, _: policy.put_weights(policy.copy_weights()),
}


def bytes_left(work: Callable[[], object]) -> int:
    """Return the bytes of the tensors that only the collector frees after `work`. The first call may fill caches."""
    work()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        work()
        gc.collect()
        return sum(one.untyped_storage().nbytes() for one in gc.garbage if isinstance(one, torch.Tensor))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("name", WORK)
def test_no_tensor_waits_for_the_collector(qwen3: Path, tmp_path: Path, name: str):
    policy = make_policy(qwen3, {})
    save(policy, tmp_path)
    assert bytes_left(lambda: WORK[name](policy, tmp_path)) == 0


def test_a_tensor_in_a_cycle_is_counted():
    def cycle() -> None:
        held: list[object] = [torch.zeros(256)]
        held.append(held)

    assert bytes_left(cycle) == 1024

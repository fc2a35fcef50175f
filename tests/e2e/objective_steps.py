"""A whole run with one objective, for a group of ranks, on a server that already runs."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.algorithms import make_algorithm
from megatron_rl.config import load_config
from megatron_rl.trainer.bringup import open_run
from megatron_rl.trainer.loop import train
from megatron_rl.types import Batch


def train_run(file: Path, overrides: list[str], port: int) -> dict[str, Any]:
    """Train as the command line does. Return facts about the run.

    Args:
        file: the configuration file.
        overrides: each `section.key=value`.
        port: port on which the ranks meet.

    Returns:
        "before" and "after" are digests of the weights. "needs" are the inputs of the objective. "asked_logmu" is
        whether this rank requests logmu from the engine; False on ranks other than 0.
    """
    os.environ["MASTER_PORT"] = str(port)
    with open_run(load_config(file, overrides), resume=False) as trainer:
        before = _digest(trainer)
        train(trainer, make_algorithm(trainer.plan.algorithm))
        lead = trainer.lead
        return {
            "before": before,
            "after": _digest(trainer),
            "needs": set(trainer.plan.algorithm.objective.needs),
            "asked_logmu": lead is not None and lead.rollouts.need_logmu,
        }


def _digest(trainer: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in trainer.policy.export():
        if tensor is not None:
            found.update(name.encode() + tensor.float().numpy().tobytes())
    return found.hexdigest()


def resume_run(file: Path, overrides: list[str], port: int) -> dict[str, Any]:
    """Resume a run without a step. Return log-probabilities of a batch under the policy and under its reference."""
    os.environ["MASTER_PORT"] = str(port)
    with open_run(load_config(file, overrides), resume=True) as trainer:
        policy, batch = trainer.policy, sums_batch()
        return {
            "step": trainer.state.step,
            "own": policy.logprobs(batch),
            "reference": policy.reference_logprobs(batch),
            "digest": _digest(trainer),
        }


def sums_batch() -> Batch:
    """Return one trajectory of the small arithmetic model, of which every token but the first is scored."""
    mask = np.array([0, 1, 1, 1, 1, 1], dtype=np.float32)
    return Batch(
        ids=np.zeros(1, dtype=np.int64),
        groups=np.zeros(1, dtype=np.int64),
        tokens=np.array([4, 6, 4, 8, 5, 1], dtype=np.int32),
        cu_seqlens=np.array([0, 6]),
        mask=mask,
        rewards=np.zeros(1, dtype=np.float32),
        advantages=np.zeros(1, dtype=np.float32),
    )

"""What a group of ranks runs to train with one objective: the whole of a run, on a server that is up already."""

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_rl.algorithms import make_algorithm
from megatron_rl.config import load_config
from megatron_rl.trainer.bringup import open_run
from megatron_rl.trainer.loop import train


def train_run(file: Path, overrides: list[str], port: int) -> dict[str, Any]:
    """Train as the command line does; rank 0 returns the digest of the weights before and after."""
    os.environ["MASTER_PORT"] = str(port)
    with open_run(load_config(file, overrides), resume=False) as trainer:
        before = _digest(trainer)
        train(trainer, make_algorithm(trainer.plan))
        lead = trainer.lead
        return {
            "before": before,
            "after": _digest(trainer),
            "needs": set(trainer.plan.objective.needs),
            "asked_logmu": lead is not None and lead.rollouts.need_logmu,
        }


def _digest(trainer: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in trainer.policy.export():
        if tensor is not None:
            found.update(name.encode() + tensor.float().numpy().tobytes())
    return found.hexdigest()

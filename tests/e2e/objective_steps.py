"""What a group of ranks runs to train with one objective: the whole of a run, on a server that is up already."""

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_rl.config import load_config
from megatron_rl.trainer.bringup import open_run
from megatron_rl.trainer.loop import train


def train_run(file: Path, overrides: list[str], port: int) -> dict[str, Any]:
    """Train as the command line does; rank 0 answers the digest of the weights before and after."""
    os.environ["MASTER_PORT"] = str(port)
    with open_run(load_config(file, overrides), resume=False) as run:
        before = _digest(run)
        train(run)
        lead = run.mesh.rank == 0
        return {
            "before": before,
            "after": _digest(run),
            "needs": set(run.objective.needs),
            "asked_logmu": lead and run.rollouts.need_logmu,
        }


def _digest(run: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in run.policy.export():
        if tensor is not None:
            found.update(name.encode() + tensor.float().numpy().tobytes())
    return found.hexdigest()

"""A whole run with one objective, for a group of ranks, on a server that already runs."""

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_rl.algorithms import make_algorithm
from megatron_rl.config import load_config
from megatron_rl.trainer.bringup import open_run
from megatron_rl.trainer.loop import train


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

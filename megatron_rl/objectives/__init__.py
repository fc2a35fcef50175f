"""Objectives: pure functions from per-token log-probabilities and advantages to a loss. One file per method."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_rl.errors import ConfigError
from megatron_rl.objectives.advantages import group_advantages
from megatron_rl.objectives.base import LossInputs, LossNorm, LossOutputs, Objective, TokenLoss
from megatron_rl.objectives.drpo import DRPO
from megatron_rl.objectives.grpo import DAPO, GRPO, PPO
from megatron_rl.objectives.options import suggest

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (DAPO, DRPO, GRPO, PPO)}

__all__ = [
    "OBJECTIVES",
    "LossInputs",
    "LossNorm",
    "LossOutputs",
    "Objective",
    "TokenLoss",
    "group_advantages",
    "make_objective",
]


def make_objective(spec: Mapping[str, Any]) -> Objective:
    """Build the objective `spec["name"]` from the other keys of `spec`.

    Raises ConfigError with the nearest valid name for an unknown objective or key, or for an illegal value.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in OBJECTIVES:
        raise ConfigError(f"unknown objective {name!r}; {suggest(name, OBJECTIVES)}")
    keys = [f.name for f in fields(OBJECTIVES[name])]
    for key in options:
        if key not in keys:
            raise ConfigError(f"objective {name} has no key '{key}'; {suggest(key, keys)}")
    return OBJECTIVES[name](**options)

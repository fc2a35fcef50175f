"""Objectives: pure functions that turn per-token log-probabilities and advantages into a loss. One file per method."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_rl.errors import ConfigError, did_you_mean
from megatron_rl.objectives.advantages import group_advantages
from megatron_rl.objectives.asympo import ASymPO
from megatron_rl.objectives.cispo import CISPO
from megatron_rl.objectives.dppo import DPPOKL, DPPOTV, DPPOTopK
from megatron_rl.objectives.drpo import DRPO
from megatron_rl.objectives.erpd import ErpdCE, ErpdDistill, ErpdMSE
from megatron_rl.objectives.grpo import DAPO, GRPO, PPO
from megatron_rl.objectives.gspo import GSPO
from megatron_rl.objectives.minirl import MiniRL
from megatron_rl.objectives.objective import LossInputs, LossNorm, LossOutputs, Objective, TokenLoss
from megatron_rl.objectives.sapo import SAPO
from megatron_rl.objectives.scaled_po import Naive, ScaledPO
from megatron_rl.objectives.simple_po import SimplePO

_RATIO = (CISPO, DAPO, DPPOKL, DPPOTV, DPPOTopK, DRPO, GRPO, GSPO, MiniRL, PPO, SAPO, SimplePO)
_OTHERS = (ASymPO, ErpdCE, ErpdDistill, ErpdMSE, Naive, ScaledPO)

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (*_RATIO, *_OTHERS)}

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

    Raises:
        ConfigError: an objective or key is unknown (the message gives the nearest valid name), or a value is illegal.
    """
    if not isinstance(spec, Mapping):
        raise ConfigError(f"an objective is {spec!r}; it must be a mapping such as {{name: drpo, delta: 0.04}}")
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ConfigError(f"unknown objective {name!r}; {did_you_mean(name, OBJECTIVES)}")
    keys = [f.name for f in fields(OBJECTIVES[name])]
    for key in options:
        if key not in keys:
            raise ConfigError(f"objective {name} has no key '{key}'; {did_you_mean(key, keys)}")
    return OBJECTIVES[name](**options)

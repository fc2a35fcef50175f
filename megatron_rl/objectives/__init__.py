"""Objectives: pure functions that turn per-token log-probabilities and advantages into a loss. One file per method."""

from megatron_rl.objectives.advantages import group_advantages
from megatron_rl.objectives.make_objective import OBJECTIVES, make_objective, objective_class
from megatron_rl.objectives.objective import LossInputs, LossNorm, LossOutputs, Objective, TokenLoss
from megatron_rl.objectives.options import choice, flag, integer, nonnegative, positive
from megatron_rl.objectives.ratio import RatioObjective

__all__ = [
    "OBJECTIVES",
    "LossInputs",
    "LossNorm",
    "LossOutputs",
    "Objective",
    "RatioObjective",
    "TokenLoss",
    "choice",
    "flag",
    "group_advantages",
    "integer",
    "make_objective",
    "nonnegative",
    "objective_class",
    "positive",
]

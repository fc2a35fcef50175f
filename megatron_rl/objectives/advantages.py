"""Advantages of trajectories within the group of their prompt."""

from typing import Literal, get_args

import numpy as np

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.objectives.options import suggest

AdvantageKind = Literal["mean", "grpo"]

_STD_FLOOR = 1e-6


def group_advantages(rewards: np.ndarray, groups: np.ndarray, kind: AdvantageKind) -> np.ndarray:
    """rewards [B], groups [B] (any ids) -> advantages [B] float32, computed in float64.

    mean: R - mean(R) of the group (Dr. GRPO, DRPO, DPPO). grpo: (R - mean) / (std + 1e-6), unbiased std; a group
    of one has mean 0 and std 1. A group of equal rewards gets exact zeros. Raises UserError for a reward that is
    not finite or arrays that do not match, ConfigError for an unknown kind.
    """
    if kind not in get_args(AdvantageKind):
        raise ConfigError(f"advantage is {kind!r}; {suggest(kind, get_args(AdvantageKind))}")
    rewards, groups = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise UserError(f"rewards {list(rewards.shape)} and groups {list(groups.shape)} must be of one shape [B]")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise UserError(f"reward of trajectory {bad[0]} (group {groups[bad[0]]}) is {rewards[bad[0]]}: rewards must be finite")

    _, group = np.unique(groups, return_inverse=True)
    size = np.bincount(group)
    centred = rewards - (np.bincount(group, rewards) / size)[group]
    highest = np.full(len(size), -np.inf)
    np.maximum.at(highest, group, rewards)
    lowest = np.full(len(size), np.inf)
    np.minimum.at(lowest, group, rewards)
    # The mean of equal numbers need not be that number in floating point.
    centred[(highest == lowest)[group]] = 0.0
    if kind == "mean":
        return centred.astype(np.float32)
    std = np.sqrt(np.bincount(group, centred**2) / np.maximum(size - 1, 1))
    alone = (size == 1)[group]
    return np.where(alone, rewards / (1 + _STD_FLOOR), centred / (std[group] + _STD_FLOOR)).astype(np.float32)

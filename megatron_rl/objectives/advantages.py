"""Advantages of trajectories within the group of their prompt, and transformations of rewards and advantages."""

from typing import Literal, get_args

import numpy as np

from megatron_rl.errors import ConfigError, UserError, did_you_mean

AdvantageKind = Literal["mean", "grpo", "rloo", "dr_grpo", "whiten"]

_GRPO_FLOOR = 1e-6
_WHITEN_FLOOR = 1e-8


def group_advantages(rewards: np.ndarray, groups: np.ndarray, kind: AdvantageKind) -> np.ndarray:
    """Return the advantages of trajectories within their group, [B] float32, computed in float64.

        mean      R - mean(R) of the group (DRPO, DPPO, ASymPO)
        dr_grpo   the same; the constant length by which Dr. GRPO (arXiv 2503.20783) divides the loss is the
                  objective's norm, seq_mean_token_sum_norm with a horizon
        grpo      (R - mean) / (std + 1e-6), unbiased std of the group (arXiv 2402.03300); a group of one has mean 0
                  and std 1
        rloo      R - mean of the others of the group (arXiv 2402.14740); a group of one has no others and gets 0
        whiten    (R - mean) / (std + 1e-8), unbiased std of R - mean over all B (arXiv 2501.03262, with a group
                  baseline)

    A group of equal rewards gets exact zeros. The exception is a group of one under `grpo`, which keeps its reward.

    Args:
        rewards: [B].
        groups: [B], the group of each trajectory; any ids.
        kind: one of the five names above.

    Raises:
        UserError: a reward is not finite, or the arrays do not match.
        ConfigError: `kind` is unknown.
    """
    if kind not in get_args(AdvantageKind):
        raise ConfigError(f"advantage is {kind!r}; {did_you_mean(kind, get_args(AdvantageKind))}")
    rewards, groups = np.asarray(rewards, dtype=np.float64), np.asarray(groups)
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise UserError(f"rewards {list(rewards.shape)} and groups {list(groups.shape)} must be of one shape [B]")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise UserError(
            f"reward of trajectory {bad[0]} (group {groups[bad[0]]}) is {rewards[bad[0]]}: rewards must be finite"
        )

    _, group = np.unique(groups, return_inverse=True)
    size = np.bincount(group)
    out = _centered(rewards, group, size)
    if kind == "rloo":
        out = out * (size / np.maximum(size - 1, 1))[group]
    elif kind == "whiten":
        out = out / (np.sqrt((out**2).sum() / max(len(out) - 1, 1)) + _WHITEN_FLOOR)
    elif kind == "grpo":
        std = np.sqrt(np.bincount(group, out**2) / np.maximum(size - 1, 1))
        out = np.where((size == 1)[group], rewards / (1 + _GRPO_FLOOR), out / (std[group] + _GRPO_FLOOR))
    return out.astype(np.float32)


def whiten_tokens(raw: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (raw - mean) / sqrt(variance + 1e-8) over the tokens with mask 1, with unbiased variance, [N] float64.

    `raw` and `mask` are [N]. The result is 0 where mask is 0, whatever `raw` contains there. If all values with mask 1
    are equal (also if there is only one), every result is an exact zero.

    Raises:
        UserError: the shapes differ, or a value with mask 1 is not finite.
    """
    raw, keep = np.asarray(raw, dtype=np.float64), np.asarray(mask) != 0
    if raw.ndim != 1 or raw.shape != keep.shape:
        raise UserError(f"raw {list(raw.shape)} and mask {list(keep.shape)} must be of one shape [N]")
    values, out = raw[keep], np.zeros(len(raw))
    bad = np.flatnonzero(keep)[~np.isfinite(values)]
    if len(bad):
        raise UserError(
            f"raw[{bad[0]}] is {raw[bad[0]]} on a trained token ({len(bad)} such tokens): nothing can be whitened"
        )
    # The mean of equal numbers need not be that number in floating point.
    if len(values) and values.max() > values.min():
        out[keep] = (values - values.mean()) / np.sqrt(values.var(ddof=1) + _WHITEN_FLOOR)
    return out


def overlong_penalty(lengths: np.ndarray, max_tokens: int, buffer: int, penalty: float = 1.0) -> np.ndarray:
    """Return the penalty on overlong responses, [B] float64, to be added to their rewards (arXiv 2503.14476, Eq. 13).

    The penalty is 0 up to max_tokens - buffer, then falls linearly to -penalty at max_tokens, and is -penalty beyond.

    Args:
        lengths: [B], length of each response in tokens.
        max_tokens: length of the longest response, in tokens.
        buffer: length of the linear part, in tokens.
        penalty: size of the full penalty.

    Raises:
        ConfigError: unless 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ConfigError(
            f"the overlong buffer is {buffer} tokens; it must lie in 1..{max_tokens}, the longest response"
        )
    over = np.asarray(lengths, dtype=np.float64) - (max_tokens - buffer)
    return -penalty * np.clip(over / buffer, 0.0, 1.0) + 0.0  # + 0.0 turns negative zeros into zeros


def _centered(rewards: np.ndarray, group: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return rewards minus the mean of their group, [B].

    Args:
        rewards: [B].
        group: [B], number of the group of each reward.
        size: number of rewards of each group.
    """
    centered: np.ndarray = rewards - (np.bincount(group, rewards) / size)[group]
    highest = np.full(len(size), -np.inf)
    np.maximum.at(highest, group, rewards)
    lowest = np.full(len(size), np.inf)
    np.minimum.at(lowest, group, rewards)
    # The mean of equal numbers need not be that number in floating point.
    centered[(highest == lowest)[group]] = 0.0
    return centered

"""From verified trajectories to the columns of a batch, and from a batch to its updates."""

import math
from collections.abc import Sequence

import numpy as np

from megatron_rl.errors import UserError
from megatron_rl.objectives.advantages import AdvantageKind, group_advantages
from megatron_rl.types import Batch, Trajectory


def make_batch(trajectories: Sequence[Trajectory], advantage: AdvantageKind) -> Batch:
    """One batch; every response token is trained.

    Raises UserError with the trajectory ids when a reward is missing or not finite.
    """
    bad = [t.id for t in trajectories if t.reward is None or not math.isfinite(t.reward)]
    if bad:
        raise UserError(f"reward is missing or not finite for trajectories {bad[:20]}: the step is refused; mend the verifier")
    prompts = np.array([len(t.prompt_tokens) for t in trajectories])
    responses = np.array([len(t.response_tokens) for t in trajectories])
    cu_seqlens = np.concatenate([[0], np.cumsum(prompts + responses)])
    position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], prompts + responses)
    mask = (position >= np.repeat(prompts, prompts + responses)).astype(np.float32)
    logmu = None
    if trajectories[0].logmu is not None:
        logmu = np.zeros(cu_seqlens[-1], dtype=np.float32)
        logmu[mask > 0] = np.concatenate([np.asarray(t.logmu, dtype=np.float32) for t in trajectories])
    rewards = np.array([t.reward for t in trajectories], dtype=np.float32)
    groups = np.array([t.group for t in trajectories])
    return Batch(
        ids=np.array([t.id for t in trajectories]),
        groups=groups,
        tokens=np.concatenate([np.asarray(t.prompt_tokens + t.response_tokens, dtype=np.int32) for t in trajectories]),
        cu_seqlens=cu_seqlens,
        mask=mask,
        rewards=rewards,
        advantages=group_advantages(rewards, groups, advantage),
        logmu=logmu,
        prompt_ids=tuple(t.prompt_id for t in trajectories),
    )


def split_updates(batch: Batch, updates: int) -> list[Batch]:
    """Cut a step's batch into `updates` parts of whole groups."""
    parts = np.array_split(np.unique(batch.groups), updates)
    return [batch.select(np.flatnonzero(np.isin(batch.groups, part))) for part in parts]

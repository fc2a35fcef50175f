"""From verified trajectories to the columns of a batch, and from a batch to its updates."""

import math
from collections.abc import Sequence

import numpy as np

from megatron_rl.errors import UserError
from megatron_rl.objectives.advantages import AdvantageKind, group_advantages, overlong_penalty
from megatron_rl.types import Batch, Trajectory


def make_batch(
    trajectories: Sequence[Trajectory], advantage: AdvantageKind, overlong_buffer: int = 0, max_new_tokens: int = 0
) -> Batch:
    """One batch; every response token is trained.

    overlong_buffer: when not 0, advantages are those of rewards plus `overlong_penalty` of the response lengths, whose
    limit is max_new_tokens; the batch's `rewards` stay the verifier's.
    Raises UserError with the trajectory ids when a reward is missing or not finite, or top-K tokens are there for some only.
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
    topk_ids, topk_logmu = _topk_columns(trajectories, mask)
    rewards = np.array([t.reward for t in trajectories], dtype=np.float32)
    shaped = rewards + overlong_penalty(responses, max_new_tokens, overlong_buffer) if overlong_buffer else rewards
    groups = np.array([t.group for t in trajectories])
    return Batch(
        ids=np.array([t.id for t in trajectories]),
        groups=groups,
        tokens=np.concatenate([np.asarray(t.prompt_tokens + t.response_tokens, dtype=np.int32) for t in trajectories]),
        cu_seqlens=cu_seqlens,
        mask=mask,
        rewards=rewards,
        advantages=group_advantages(shaped, groups, advantage),
        logmu=logmu,
        prompt_ids=tuple(t.prompt_id for t in trajectories),
        topk_ids=topk_ids,
        topk_logmu=topk_logmu,
    )


def _topk_columns(trajectories: Sequence[Trajectory], mask: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Ids [N, K] int32 and log-probabilities [N, K] float32 of the engine's likeliest tokens; 0 where mask is 0."""
    given = [t.topk for t in trajectories if t.topk is not None]
    if not given:
        return None, None
    if len(given) < len(trajectories):
        missing = [t.id for t in trajectories if t.topk is None]
        raise UserError(f"trajectories {missing[:20]} carry no top-K tokens while others do: ask the engines for all or none")
    ids = np.zeros((len(mask), given[0].ids.shape[1]), dtype=np.int32)
    logmu = np.zeros(ids.shape, dtype=np.float32)
    ids[mask > 0] = np.concatenate([topk.ids for topk in given])
    logmu[mask > 0] = np.concatenate([topk.logmu for topk in given])
    return ids, logmu


def split_updates(batch: Batch, updates: int) -> list[Batch]:
    """Cut a step's batch into `updates` parts of whole groups."""
    parts = np.array_split(np.unique(batch.groups), updates)
    return [batch.select(np.flatnonzero(np.isin(batch.groups, part))) for part in parts]

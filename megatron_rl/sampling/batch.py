"""Conversion of verified trajectories into the columns of a batch."""

import math
from collections.abc import Sequence

import numpy as np

from megatron_rl.errors import UserError
from megatron_rl.objectives.advantages import AdvantageKind, group_advantages, overlong_penalty
from megatron_rl.types import Batch, Trajectory


def make_batch(
    trajectories: Sequence[Trajectory], advantage: AdvantageKind, overlong_buffer: int = 0, max_new_tokens: int = 0
) -> Batch:
    """Return one batch. Every response token is trained, except tokens whose response_mask is 0.

    Args:
        trajectories: verified trajectories, which become the rows of the batch.
        advantage: how rewards become advantages.
        overlong_buffer: if not 0, advantages are computed from rewards plus `overlong_penalty` of the response lengths.
            The batch's `rewards` stay the verifier's.
        max_new_tokens: length limit of `overlong_penalty`, in tokens.

    Raises:
        UserError: a reward is missing or not finite, or only some trajectories have top-K tokens or routed experts. The
            message names the trajectory ids.
    """
    bad = [t.id for t in trajectories if t.reward is None or not math.isfinite(t.reward)]
    if bad:
        raise UserError(
            f"reward is missing or not finite for trajectories {bad[:20]}: the step is refused; fix the verifier"
        )
    prompts = np.array([len(t.prompt_tokens) for t in trajectories])
    responses = np.array([len(t.response_tokens) for t in trajectories])
    cu_seqlens = np.concatenate([[0], np.cumsum(prompts + responses)])
    position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], prompts + responses)
    response = position >= np.repeat(prompts, prompts + responses)

    def of_response(rows: list[np.ndarray], fill: float) -> np.ndarray:
        """Return a per-token column made of per-response rows, with `fill` where no token is trained."""
        column = np.full((len(position), *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
        column[response] = np.concatenate(rows)
        column[mask == 0] = fill
        return column

    mask = response.astype(np.float32)
    mask[response] = np.concatenate([_trained(t) for t in trajectories])
    logmu = versions = None
    if trajectories[0].logmu is not None:
        logmu = of_response([np.asarray(t.logmu, dtype=np.float32) for t in trajectories], 0)
    if all(t.versions for t in trajectories):
        versions = of_response([_versions(t) for t in trajectories], -1)
    with_topk = _all_or_none(trajectories, "topk", "top-K tokens")
    topk = [t.topk for t in trajectories if t.topk is not None] if with_topk else None
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
        topk_ids=None if topk is None else of_response([t.ids for t in topk], 0),
        topk_logmu=None if topk is None else of_response([t.logmu for t in topk], 0),
        versions=versions,
        routing=_routing(trajectories),
    )


def _trained(trajectory: Trajectory) -> np.ndarray:
    size = len(trajectory.response_tokens)
    return (
        np.ones(size, np.float32)
        if trajectory.response_mask is None
        else np.asarray(trajectory.response_mask, np.float32)
    )


def _versions(trajectory: Trajectory) -> np.ndarray:
    """Return the weight version of each token, [R] int32; -1 for tokens that no span covers, which are tool output."""
    versions = np.full(len(trajectory.response_tokens), -1, dtype=np.int32)
    for span in trajectory.versions:
        versions[span.start : span.end] = span.version
    return versions


def _all_or_none(trajectories: Sequence[Trajectory], name: str, what: str) -> bool:
    """Return whether all trajectories have the field. Raise UserError if only some of them have it."""
    missing = [t.id for t in trajectories if getattr(t, name) is None]
    if missing and len(missing) < len(trajectories):
        raise UserError(f"trajectories {missing[:20]} carry no {what} while others do: ask the engines for all or none")
    return not missing


def _routing(trajectories: Sequence[Trajectory]) -> np.ndarray | None:
    """Return the routed experts, [N, L, K] int32, or None if no trajectory has any.

    The last token of each trajectory has -1: it was never an input of the engine.
    """
    if not _all_or_none(trajectories, "routing", "routed experts"):
        return None
    rows = [np.asarray(t.routing, dtype=np.int32) for t in trajectories]
    last = np.full((1, *rows[0].shape[1:]), -1, dtype=np.int32)
    return np.concatenate([part for row in rows for part in (row, last)])

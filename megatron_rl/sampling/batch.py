"""Conversion of verified trajectories into the columns of a batch."""

import math
from collections.abc import Sequence

import numpy as np

from megatron_rl.errors import UserError
from megatron_rl.objectives.advantages import AdvantageKind, group_advantages, overlong_penalty
from megatron_rl.types import COLUMNS, Batch, Trajectory


def make_batch(
    trajectories: Sequence[Trajectory], advantage: AdvantageKind, overlong_buffer: int = 0, max_new_tokens: int = 0
) -> Batch:
    """Return one batch. Every response token is trained, except tokens whose mask is 0.

    Args:
        trajectories: verified trajectories, which become the rows of the batch.
        advantage: how rewards become advantages.
        overlong_buffer: if not 0, advantages are computed from rewards plus `overlong_penalty` of the response lengths.
            The batch's `rewards` stay the verifier's.
        max_new_tokens: length limit of `overlong_penalty`, in tokens.

    Raises:
        UserError: a reward is missing or not finite, or only some trajectories have a sampled column or routed experts.
            The message names the trajectory ids.
    """
    bad = [t.id for t in trajectories if t.reward is None or not math.isfinite(t.reward)]
    if bad:
        raise UserError(
            f"reward is missing or not finite for trajectories {bad[:20]}: the step is refused; fix the verifier"
        )
    responses = np.array([len(t.response_tokens) for t in trajectories])
    rewards = np.array([t.reward for t in trajectories], dtype=np.float32)
    shaped = rewards + overlong_penalty(responses, max_new_tokens, overlong_buffer) if overlong_buffer else rewards
    groups = np.array([t.group for t in trajectories])
    return Batch(
        ids=np.array([t.id for t in trajectories]),
        groups=groups,
        prompt_ids=np.array([t.prompt_id for t in trajectories]),
        rewards=rewards,
        advantages=group_advantages(shaped, groups, advantage),
        **_token_columns(trajectories, responses),
        routing=_routing(trajectories),
    )


def _token_columns(trajectories: Sequence[Trajectory], responses: np.ndarray) -> dict[str, np.ndarray]:
    """Return cu_seqlens and the sampled columns. `responses` are the lengths of the responses."""
    prompts = np.array([len(t.prompt_tokens) for t in trajectories])
    lengths = prompts + responses
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    response = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths) >= np.repeat(prompts, lengths)
    trained = response.copy()
    trained[response] = np.concatenate([t.columns["mask"] for t in trajectories]) > 0
    out = {
        "cu_seqlens": cu_seqlens,
        "tokens": np.concatenate([part for t in trajectories for part in (t.prompt_tokens, t.response_tokens)]),
    }
    for name, column in COLUMNS.items():
        rows = [t.columns.get(name) for t in trajectories] if column.sampled and name not in out else []
        if _all_or_none(trajectories, rows, f"column '{name}'"):
            values = np.concatenate([row for row in rows if row is not None])
            out[name] = np.full((len(response), *values.shape[1:]), column.fill, dtype=column.dtype)
            out[name][trained] = values[trained[response]]
    return out


def _all_or_none(trajectories: Sequence[Trajectory], values: Sequence[object], what: str) -> bool:
    """Return whether all trajectories have a value. Raise UserError if only some of them have one."""
    missing = [t.id for t, value in zip(trajectories, values, strict=False) if value is None]
    if missing and len(missing) < len(trajectories):
        raise UserError(f"trajectories {missing[:20]} carry no {what} while others do: ask the engines for all or none")
    return bool(values) and not missing


def _routing(trajectories: Sequence[Trajectory]) -> np.ndarray | None:
    """Return the routed experts, [N, L, K] int32, or None if no trajectory has any.

    The last token of each trajectory has -1: it was never an input of the engine.
    """
    if not _all_or_none(trajectories, [t.routing for t in trajectories], "routed experts"):
        return None
    rows = [np.asarray(t.routing, dtype=np.int32) for t in trajectories]
    last = np.full((1, *rows[0].shape[1:]), -1, dtype=np.int32)
    return np.concatenate([part for row in rows for part in (row, last)])

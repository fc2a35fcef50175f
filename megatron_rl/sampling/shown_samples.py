"""The responses of a step that are kept for `samples.jsonl`: chosen while sampling, decoded after the step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rl.diagnostics.samples import ShownSample
from megatron_rl.sampling.group import Group
from megatron_rl.types import Trajectory

Kept = list[dict[str, Any]]


def keep_samples(groups: Sequence[Group], prompts: int) -> Kept:
    """Return the responses of the first groups as JSON data, not yet decoded.

    Args:
        groups: the groups that the step trains on.
        prompts: number of groups to keep.
    """
    return [_keep(trajectory) for group in groups[:prompts] for trajectory in group.trajectories]


def _keep(trajectory: Trajectory) -> dict[str, Any]:
    assert trajectory.reward is not None  # it is in the step's batch
    return {
        "trajectory": trajectory.id,
        "prompt_id": trajectory.prompt_id,
        "prompt": trajectory.prompt_tokens.tolist(),
        "response": trajectory.response_tokens.tolist(),
        "reward": float(trajectory.reward),
        "finish_reason": trajectory.finish_reason,
    }


def decode_samples(
    kept: Kept, step: int, tokenizer: PreTrainedTokenizerBase, k3: Mapping[int, float]
) -> list[ShownSample]:
    """Return the rows of `keep_samples` as text.

    Args:
        kept: the result of `keep_samples`.
        step: number of the step.
        tokenizer: the run's tokenizer.
        k3: k3 of trajectories whose engine log-probabilities are known, by trajectory id.
    """
    if not kept:  # transformers decodes an empty batch to one text
        return []
    prompts, responses = (tokenizer.batch_decode([row[key] for row in kept]) for key in ("prompt", "response"))
    return [
        ShownSample(
            step=step,
            trajectory=row["trajectory"],
            prompt_id=row["prompt_id"],
            prompt=prompt,
            response=response,
            reward=row["reward"],
            tokens=len(row["response"]),
            finish_reason=row["finish_reason"],
            k3=_finite(k3.get(row["trajectory"])),
        )
        for row, prompt, response in zip(kept, prompts, responses, strict=True)
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

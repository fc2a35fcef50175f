"""Trajectories and samples from plain numbers, for tests."""

from collections.abc import Sequence

import numpy as np

from megatron_rl.protocol.generation import Sample
from megatron_rl.types import COLUMNS, Trajectory

# The dtypes in which samples and trajectories hold their columns; COLUMNS has those of a batch.
DTYPES = {name: np.dtype(column.dtype) for name, column in COLUMNS.items() if column.sampled} | {
    "mask": np.dtype(np.int8)
}


def columns_of(tokens: Sequence[int], **columns: object) -> dict[str, np.ndarray]:
    """Return sampled columns as arrays; None leaves a column out."""
    given = {"tokens": tokens, **columns}
    return {name: np.array(values, DTYPES[name]) for name, values in given.items() if values is not None}


def make_sample(
    tokens: Sequence[int],
    reason: str = "stop",
    *,
    fault: str = "",
    retractions: int = 0,
    routing: np.ndarray | None = None,
    **columns: object,
) -> Sample:
    """Return a sample of weight version 1. `columns` has other columns, and other versions.

    Args:
        tokens: the tokens.
        reason: the finish reason.
        fault: what failed inside the engine.
        retractions: as in `Sample`.
        routing: as in `Sample`.
        columns: columns by name, as lists.
    """
    given = columns_of(tokens, **{"versions": [1] * len(tokens), **columns})
    return Sample(given, reason, fault, None, retractions, routing)


def make_trajectory(
    number: int,
    group: int,
    prompt: Sequence[int],
    response: Sequence[int],
    reward: float | None = 0.0,
    *,
    reason: str = "stop",
    prompt_id: str = "p",
    routing: np.ndarray | None = None,
    **columns: object,
) -> Trajectory:
    """Return a trajectory whose tokens are all trained, unless `columns` has another mask.

    Args:
        number: its id.
        group: number of its group.
        prompt: tokens of the prompt.
        response: tokens of the response.
        reward: its reward.
        reason: the finish reason.
        prompt_id: name of the prompt.
        routing: as in `Trajectory`.
        columns: columns of the response by name, as lists.
    """
    given = columns_of(response, **{"mask": [1] * len(response), **columns})
    return Trajectory(number, group, prompt_id, np.array(prompt, np.int32), given, reason, reward, routing)

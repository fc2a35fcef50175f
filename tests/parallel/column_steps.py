"""Functions that the ranks of a group run with a column that the package does not know."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from megatron_rl.objectives import LossInputs, LossNorm, LossOutputs
from megatron_rl.protocol.generation import GenerationRequest, Sample, SamplingParams
from megatron_rl.protocol.responses import read_samples
from megatron_rl.sampling.batch import make_batch
from megatron_rl.sampling.group import Group
from megatron_rl.sampling.journal import GroupJournal
from megatron_rl.sampling.trajectory_builder import TrajectoryBuilder
from megatron_rl.types import COLUMNS, Batch, Column, Prompt, Trajectory
from tests.parallel.steps import make_policy

DRAFT = Column("draft", "float32", "a number of the engine's own", sampled=True, finite=True, answer_key="draft_scores")
TOOL = 3  # tokens of the tool's output between the two turns


def value(trajectory: int, position: int) -> float:
    """Return the engine's number of a response token, by trajectory id and position in the response."""
    return 1 + 100 * trajectory + position


def prompt_length(trajectory: Any) -> Any:
    """Return the number of prompt tokens, which the two trajectories of a group share."""
    return 1 + trajectory // 2 % 3


def sampled(trajectory: int, start: int, tokens: int) -> Sample:
    """Return what the client reads from an engine's answer: the tokens of a turn that starts at a position."""
    ids = [(7 * trajectory + at) % 250 for at in range(start, start + tokens)]
    meta = {
        "id": "r",
        "prompt_tokens": 2,
        "finish_reason": {"type": "stop"},
        "weight_versions": [{"version": "1", "start": 0, "end": tokens}],
        "output_token_logprobs": [[-5.0, token, None] for token in ids],
        "draft_scores": [value(trajectory, at) for at in range(start, start + tokens)],
    }
    request = GenerationRequest("r", (1, 2), 1, SamplingParams(tokens))
    return read_samples("http://engine", request, orjson.dumps({"output_ids": ids, "meta_info": meta}))[0]


def trajectory(number: int) -> Trajectory:
    """Return a response of two turns with a tool's output between them."""
    first, second = 4 + number % 5, 3 + number % 7
    response = TrajectoryBuilder(sampled(number, 0, first))
    response.add_observation(range(TOOL))
    response.add_sample(sampled(number, first + TOOL, second))
    prompt = Prompt("p", "", tuple(range(prompt_length(number))), "")
    return response.trajectory(number, number // 2, prompt).with_reward(float(number % 2))


def resumed(folder: Path) -> Batch:
    """Return the batch of twelve trajectories that were written to disk and read back by another process."""
    for group in range(6):
        rows = [trajectory(2 * group + at) for at in range(2)]
        GroupJournal(folder, "asked").append(0, Group(rows))
    found, _ = GroupJournal(folder, "asked").recover(lambda _: True)
    return make_batch([row for group in found.values() for row in group.trajectories], "mean")


class ReadsDraft:
    """An objective that compares the column with trajectory id and position. Its loss is 0.

    Args:
        batch: the batch, in whose order `seq_ids` number the trajectories.
        shift: positions by which the expected values are moved; a control.
    """

    def __init__(self, batch: Batch, shift: int = 0) -> None:
        self.batch, self.shift = batch, shift

    def __call__(self, x: LossInputs) -> LossOutputs:
        rows, mask = x.seq_ids[0].numpy(), x.mask[0].numpy() > 0
        found = x.columns["draft"][0].numpy()
        first = np.array([np.flatnonzero(rows == row)[0] if (rows == row).any() else 0 for row in rows])
        position = np.arange(len(rows)) - first + 1 + self.shift  # of the label
        prompts = prompt_length(self.batch.ids[rows])
        want = np.array([value(i, p) for i, p in zip(self.batch.ids[rows], position - prompts, strict=True)])
        wrong = float(np.abs(found - want)[mask].sum() + np.abs(found)[~mask].sum())
        loss_tok = x.logp * 0
        metrics = {"wrong": torch.tensor(wrong), "seen": torch.tensor(float(mask.sum()))}
        return LossOutputs(loss_tok.sum(), loss_tok, None, metrics)


def update(model: Path, layout: dict[str, Any], folder: Path, shift: int = 0) -> dict[str, float]:
    """Declare the column, read the batch from disk and make an update. Return the metrics, and the trained tokens.

    Args:
        model: a Hugging Face folder.
        layout: the `parallel` section.
        folder: where the groups of rank 0 are written.
        shift: see `ReadsDraft`.
    """
    COLUMNS[DRAFT.name] = DRAFT
    try:
        policy = make_policy(model, layout)
        batch = policy.mesh.on_lead(lambda: resumed(folder))
        held = batch if policy.mesh.rank == 0 else batch.without_rows()
        stats = policy.update(held, ReadsDraft(batch, shift), LossNorm("token_mean"))
        return {**(stats.metrics or {}), "trained": float(batch.mask.sum())}
    finally:
        del COLUMNS[DRAFT.name]

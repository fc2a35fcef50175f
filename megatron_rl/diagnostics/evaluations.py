"""The evaluations of a run, prompt by prompt: one JSON object per line of `evaluations.jsonl`.

The run log has only means. Paired comparisons of runs need the reward of every held-out prompt.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_rl.diagnostics.runlog import stays_after_resume
from megatron_rl.diagnostics.step_lines import cut_back, read_lines
from megatron_rl.files import append_file

EVALUATIONS_NAME = "evaluations.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """Rewards of held-out prompts, in the order of the task.

    Attributes:
        step: number of steps of the weights that were evaluated.
        prompts: the task's name of each prompt.
        greedy: reward of the response at temperature 0, one per prompt.
        sampled: rewards of the sampled responses, one list per prompt.
    """

    step: int
    prompts: list[str]
    greedy: list[float]
    sampled: list[list[float]]

    @property
    def rates(self) -> dict[str, float]:
        """Held-out pass rates under their log keys, `eval/greedy` and `eval/sampled`."""
        return {"eval/greedy": float(np.mean(self.greedy)), "eval/sampled": float(np.mean(self.sampled))}


class EvaluationLog:
    """Append-only file of evaluations. A second one on the same folder continues it.

    `resume_from` is the first step that will run again. Evaluations of later weights are moved to
    `evaluations.dropped.jsonl`, as the run log does it.
    """

    def __init__(self, folder: Path, resume_from: int | None = None) -> None:
        self.path = folder / EVALUATIONS_NAME
        cut_back(self.path, lambda row: stays_after_resume({**row, "kind": "eval"}, resume_from))

    def append(self, evaluation: Evaluation) -> None:
        """Write one evaluation, and wait until it is on disk."""
        append_file(self.path, json.dumps(asdict(evaluation), allow_nan=False).encode() + b"\n")


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return the evaluations of a run in the order they were written; empty if the run wrote none.

    Raises UserError if a line other than the last is malformed.
    """
    path = folder / EVALUATIONS_NAME
    return [Evaluation(**row) for _, row in read_lines(path)] if path.is_file() else []

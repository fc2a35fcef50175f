"""The samples of a run: prompts and responses as text, one JSON object per line of `samples.jsonl`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rl.diagnostics.step_lines import cut_back, read_lines
from megatron_rl.files import append_file

SAMPLES_NAME = "samples.jsonl"


@dataclass(frozen=True)
class ShownSample:
    """One response of one step.

    Attributes:
        step: number of the step that trained on it, from 0.
        trajectory: its id in the run.
        prompt_id: the task's name of the prompt.
        prompt: the prompt's text, special tokens included.
        response: the response's text, special tokens and tool output included.
        reward: the verifier's reward.
        tokens: length of the response, in tokens.
        finish_reason: "stop", "length" or "abort".
        k3: KL(mu || pi) in nats per token, estimated on the trained tokens of this response (`kl/k3`); None if the
            engine's log-probabilities are unknown, no token is trained, or the number is not finite.
    """

    step: int
    trajectory: int
    prompt_id: str
    prompt: str
    response: str
    reward: float
    tokens: int
    finish_reason: str
    k3: float | None


class SampleLog:
    """Append-only file of samples. A second one on the same folder continues it.

    Rows of the step `resume_from` and of later steps will be written again. They are moved to `samples.dropped.jsonl`.
    """

    def __init__(self, folder: Path, resume_from: int | None = None) -> None:
        self.path = folder / SAMPLES_NAME
        cut_back(self.path, lambda row: resume_from is None or row["step"] < resume_from)

    def append(self, rows: Sequence[ShownSample]) -> None:
        """Write the rows of one step, and wait until they are on disk. Without rows, no file is made."""
        if rows:
            append_file(self.path, b"".join(json.dumps(asdict(row), allow_nan=False).encode() + b"\n" for row in rows))


def read_shown_samples(folder: Path) -> list[ShownSample]:
    """Return the samples of a run in the order they were written; empty if the run wrote none.

    Raises UserError if a line other than the last is malformed.
    """
    path = folder / SAMPLES_NAME
    return [ShownSample(**row) for _, row in read_lines(path)] if path.is_file() else []

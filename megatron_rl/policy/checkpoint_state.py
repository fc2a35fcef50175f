"""State of checkpoints that can be read without a tensor. This module imports quickly, for tools that only inspect."""

import json
from dataclasses import dataclass
from pathlib import Path

COMPLETE = "complete.json"
PARTIAL = ".partial"  # suffix of a checkpoint that is not complete yet


@dataclass(frozen=True)
class TrainState:
    """The state of a run except its tensors.

    Attributes:
        step: number of completed steps.
        version: weight version that the engines serve. Version 0 is the folder that engines start from. The first
            version that a run publishes and verifies is 1.
        updates: number of optimizer updates, for the warm-up.
        seed: seed of the run.
        stage: "" between steps, else the stage of step `step` that is in progress.
        stage_updates: number of completed updates of that stage.
        drawn: all prompt draws below this number are consumed, that is, trained on or discarded. None in checkpoints of
            runs that drew the same number of prompts in every step.
        drawn_ahead: consumed prompt draws above `drawn`.
    """

    step: int = 0
    version: int = 1
    updates: int = 0
    seed: int = 0
    stage: str = ""
    stage_updates: int = 0
    drawn: int | None = None
    drawn_ahead: tuple[int, ...] = ()

    @property
    def number(self) -> int:
        """Number in the name of a checkpoint of this state: steps of a run, updates of a stage."""
        return self.stage_updates if self.stage else self.step


def newest_valid(folder: Path) -> tuple[Path | None, list[tuple[str, str]]]:
    """Return the newest checkpoint with all files complete, and (name, reason) of newer ones that were skipped."""
    skipped: list[tuple[str, str]] = []
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        reason = find_defect(candidate)
        if reason is None and candidate.suffix == PARTIAL:  # a lookup by number would not find this folder
            reason = "half-written: it was not renamed any more"
        if reason is None:
            return candidate, skipped
        skipped.append((candidate.name, reason))
    return None, skipped


def find_defect(folder: Path) -> str | None:
    """Return None for a complete checkpoint, else the reason in words."""
    note = folder / COMPLETE
    if not note.is_file():
        return f"half-written: no {COMPLETE}"
    try:
        files = json.loads(note.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError):
        return f"{COMPLETE} is damaged"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None

"""What can be said of checkpoints without reading a tensor: quick to import, for those who only look."""

import json
from dataclasses import dataclass
from pathlib import Path

COMPLETE = "complete.json"
PARTIAL = ".partial"  # suffix of a checkpoint on its way


@dataclass(frozen=True)
class TrainState:
    """Everything a run needs besides tensors. step: steps done; version: weight version the engines serve.

    Version 0 is the folder engines start from; the first one a run publishes, and proves, is 1.
    updates: of the optimizer, for its warm-up. stage: "" between steps, else the stage of step `step` that is under way,
    stage_updates of whose updates are done. drawn, drawn_ahead: prompts that were drawn and trained on or given up, all
    below a number and some above; None: in checkpoints of runs that drew the same number every step.
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
        """What a checkpoint of this state is called by: steps of a run, updates of a stage."""
        return self.stage_updates if self.stage else self.step


def newest_valid(folder: Path) -> tuple[Path | None, list[tuple[str, str]]]:
    """The newest checkpoint whose every file is there in full, and (name, reason) of newer ones passed over."""
    skipped: list[tuple[str, str]] = []
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        reason = what_is_wrong(candidate)
        if reason is None and candidate.suffix == PARTIAL:  # nobody who asks for it by its number would find it
            reason = "half-written: it was not renamed any more"
        if reason is None:
            return candidate, skipped
        skipped.append((candidate.name, reason))
    return None, skipped


def what_is_wrong(folder: Path) -> str | None:
    """None for a complete checkpoint, else the reason in words."""
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

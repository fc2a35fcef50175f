"""State of checkpoints that can be read without a tensor. This module imports quickly, for tools that only inspect."""

from dataclasses import dataclass
from pathlib import Path

from megatron_rl.policy.checkpoint_files import PARTIAL, find_defect


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


def candidates(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the checkpoints of a folder, newest first, each with the reason why it is not usable, or None.

    Only names and sizes are compared. Whoever loads a checkpoint also compares the digests of its files.
    """
    return [(path, find_defect(path) or _unnamed(path)) for path in sorted(folder.glob("step_*"), reverse=True)]


def _unnamed(folder: Path) -> str | None:
    """Return the reason against a folder that has not got its final name. A lookup by number would not find it."""
    return "half-written: it was not renamed any more" if folder.suffix == PARTIAL else None


def newest_valid(folder: Path) -> tuple[Path | None, list[tuple[str, str]]]:
    """Return the newest checkpoint with all files complete, and (name, reason) of newer ones that were skipped.

    Only names and sizes are compared.
    """
    skipped: list[tuple[str, str]] = []
    for candidate, reason in candidates(folder):
        if reason is None:
            return candidate, skipped
        skipped.append((candidate.name, reason))
    return None, skipped

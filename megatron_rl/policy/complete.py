"""Which checkpoints are whole, told from their files alone: quick to import, for those who only look."""

import json
from pathlib import Path

COMPLETE = "complete.json"
PARTIAL = ".partial"  # suffix of a checkpoint on its way


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

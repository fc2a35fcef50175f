"""The folder of one ERPD round: everything that must survive a kill except tensors. For rank 0.

`runs/<name>/erpd/step_000003/` holds `batch.npz` (the fixed batch), `columns.npz` (log-probabilities of its tokens
under every model that takes part), `round.json` (the settings and digests the round was begun with), one `.jsonl` line
for each update of a stage, and the stages' own checkpoints. Every file is complete or absent.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_rl.errors import CheckpointError, StorageError
from megatron_rl.files import append_file, parse_json, replace_file
from megatron_rl.types import Batch

STAGES = ("teacher", "student")
TEACHER_COLUMN = "teacher@"  # followed by the number of updates of the teacher
TEACHER_RATES = "teacher_rates"
_SAMPLING = "sampling"


class RoundFolder:
    """The folder of one round; created at the first write."""

    def __init__(self, rounds: Path, step: int) -> None:
        self.path = rounds / f"step_{step:06d}"

    def write_batch(self, batch: Batch, sampling: dict[str, Any]) -> None:
        """Write the batch, and how it was sampled. `sampling` is JSON data; see `Rollouts.sampling`."""
        arrays = {**batch.columns, "cu_seqlens": batch.cu_seqlens}
        self._write_arrays("batch.npz", {**arrays, _SAMPLING: np.asarray(json.dumps(sampling))})

    def read_batch(self) -> tuple[Batch, dict[str, Any]] | None:
        """Return the batch and how it was sampled; None if it is not sampled yet.

        Raise CheckpointError if the file is damaged or of an earlier version of this package.
        """
        arrays = self._read_arrays("batch.npz")
        if arrays is None:
            return None
        if _SAMPLING not in arrays:
            raise CheckpointError(f"{self.path / 'batch.npz'} is of an earlier version of this package: {self.mend}")
        sampling = json.loads(str(arrays.pop(_SAMPLING)))
        return Batch(**arrays), sampling

    def columns(self) -> dict[str, np.ndarray]:
        """Return log-probabilities [N] float32, by the name of the model that computed them."""
        return self._read_arrays("columns.npz") or {}

    def add_column(self, name: str, values: np.ndarray) -> None:
        """Add one column of log-probabilities, [N] float32."""
        self._write_arrays("columns.npz", {**self.columns(), name: values})

    def note(self) -> dict[str, Any]:
        """Return everything that `add_note` has written so far. Raise CheckpointError if the file is damaged."""
        path = self.path / "round.json"
        if not path.is_file():
            return {}
        try:
            return dict(parse_json(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): {self.mend}") from error

    def add_note(self, **more: Any) -> None:
        """Add entries to the note. The values are JSON data."""
        self._write_note({**self.note(), **more})

    def forget_teacher(self) -> None:
        """Remove the measurements of this round's teacher: its columns and its pass rates."""
        columns, note = self.columns(), self.note()
        kept = {name: values for name, values in columns.items() if not name.startswith(TEACHER_COLUMN)}
        if len(kept) < len(columns):
            self._write_arrays("columns.npz", kept)
        if note.pop(TEACHER_RATES, None) is not None:
            self._write_note(note)

    def updates(self, stage: str, done: int) -> list[dict[str, float]]:
        """Return the records of the first `done` updates of a stage. Remove later ones, which will be made again.

        Raise CheckpointError if there are fewer records, or one is damaged.
        """
        path = self.path / f"{stage}.jsonl"
        content = path.read_bytes() if path.is_file() else b""
        lines = content.split(b"\n")[:-1]  # after the last newline: nothing, or a truncated line
        if len(lines) < done:
            raise CheckpointError(f"{path} has {len(lines)} lines, but {done} updates are done: {self.mend}")
        kept = b"".join(line + b"\n" for line in lines[:done])
        if kept != content:
            self._write(path.name, lambda file: file.write(kept))
        try:
            return [dict(parse_json(line)) for line in lines[:done]]
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): {self.mend}") from error

    def add_update(self, stage: str, record: dict[str, float]) -> None:
        """Append the record of one update of a stage. Raise CheckpointError if the line cannot be written."""
        path = self.path / f"{stage}.jsonl"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            append_file(path, json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise _unwritable(path, error) from error

    def drop_checkpoints(self) -> None:
        """Remove the stages' checkpoints. Batch, columns and notes stay."""
        for stage in STAGES:
            shutil.rmtree(self.path / stage, ignore_errors=True)

    @property
    def mend(self) -> str:
        """The last part of an error message: how to begin the round again."""
        return f"remove {self.path} to begin the round again with a new batch"

    def _read_arrays(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as found:
                return {key: found[key] for key in found.files}
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} is damaged ({error}): {self.mend}") from error

    def _write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        self._write(name, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # keys are names

    def _write_note(self, note: dict[str, Any]) -> None:
        text = json.dumps(note, indent=1).encode()
        self._write("round.json", lambda file: file.write(text))

    def _write(self, name: str, fill: Callable[[IO[bytes]], Any]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_file(self.path / name, fill)
        except OSError as error:
            raise _unwritable(self.path / name, error) from error


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written ({error}): free space there")

"""The run log: one JSON object per line, written to disk before the loop continues, and also to TensorBoard.

The plots of a report use only `log.jsonl`. Records are flat, with slash-separated keys. Every record has a `step`
(int) and a `kind` ("step", "eval", "erpd" or "attribution").
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from megatron_rl.errors import UserError
from megatron_rl.files import append_file, replace_file

LOG_NAME = "log.jsonl"
DROPPED_NAME = "log.dropped.jsonl"


class RunLog:
    """Append-only log of one run. A second RunLog on the same folder continues it.

    `resume_from` is the first step that will run again. Records from this step on are moved to `log.dropped.jsonl`. So
    is a last line that is incomplete because the previous process died. Nothing is deleted.
    """

    def __init__(self, folder: Path | str, resume_from: int | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_NAME
        if self.path.exists():
            _mend(self.path, folder / DROPPED_NAME, resume_from)
        self._file = self.path.open("ab")
        self._board = SummaryWriter(str(folder / "tb"), purge_step=resume_from)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and wait until it is on disk. Numbers that are not finite become null.

        A list of numbers is written to the log but not to TensorBoard.

        Raises:
            UserError: the record has no integer `step`, or a value is not a number, text, bool, None or a list of
                numbers.
        """
        row = {key: _plain(key, value) for key, value in record.items()}
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise UserError(f"a log record needs an integer 'step', got {step!r}")
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(key, value, step)
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(folder: Path | str) -> list[dict[str, Any]]:
    """Return the records of a run in the order they were written, without an incomplete last line.

    Raises:
        UserError: there is no log, or another line is malformed; the message names file:line.
    """
    path = Path(folder) / LOG_NAME
    if not path.is_file():
        raise UserError(f"no run log at {path}")
    return [record for _, record in _records(path)]


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return (line, record) of every complete line."""
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a JSON object ({error}); fix or remove the line") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}:{number}: a JSON object with an integer 'step' is expected")
        out.append((line, record))
    return out


def _mend(path: Path, dropped: Path, resume_from: int | None) -> None:
    """Keep in `path` the complete lines before `resume_from`, each ended by a newline; move the rest to `dropped`."""
    content = path.read_bytes()
    records = _records(path)
    kept = [line for line, record in records if _stays(record, resume_from)]
    gone = [line for line, record in records if not _stays(record, resume_from)]
    torn = content[sum(len(line) + 1 for line, _ in records) :].strip()
    if torn:
        gone.append(torn)
    whole = b"".join(line + b"\n" for line in kept)
    if whole == content:
        return
    if gone:
        # Written before the log is replaced: a crash in between duplicates lines in `dropped` but loses none.
        append_file(dropped, b"".join(line + b"\n" for line in gone))
    replace_file(path, whole)


def _stays(record: dict[str, Any], resume_from: int | None) -> bool:
    """Return True if a record stays in the log when the run resumes.

    A step record describes the step of its number. An evaluation or attribution record describes the weights after that
    many steps. A run that starts from 0 again evaluates again.
    """
    if resume_from is None or record["step"] < resume_from:
        return True
    return record.get("kind") in ("eval", "attribution") and 0 < record["step"] == resume_from


def _plain(key: str, value: Any) -> Any:
    """Return a JSON value: tensor and array scalars become numbers, and numbers that are not finite become None."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(one, (bool, int, float)) or one is None for one in value):
        return [_plain(key, one) for one in value]
    raise UserError(
        f"log record: '{key}' is a {type(value).__name__}; a number, text, bool, None or a list of numbers is expected"
    )

"""The run log: one JSON object a line, on disk before the loop goes on, and TensorBoard beside it.

Everything a report shows is in `log.jsonl`. Records are flat, with slash keys; every record has a `step`
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

LOG_NAME = "log.jsonl"
DROPPED_NAME = "log.dropped.jsonl"


class RunLog:
    """Append-only log of one run. A second RunLog on the folder continues it.

    resume_from: the first step that will run again. Records from it on are moved to `log.dropped.jsonl`, as is a
    last line that was cut short when the previous process died; nothing is deleted.
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

        A list of numbers is kept in the log and left out of TensorBoard. Raises UserError for a record without an
        integer `step`, or a value that is none of number, text, bool, None or a list of numbers.
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
    """The records of a run in the order they were written; a last line cut short is left out.

    Raises UserError when there is no log, or naming file:line for any other malformed line.
    """
    path = Path(folder) / LOG_NAME
    if not path.is_file():
        raise UserError(f"no run log at {path}")
    return [record for _, record in _records(path)]


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, record) of every whole line."""
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
            raise UserError(f"{path}:{number}: not a JSON object ({error}); mend or remove the line") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}:{number}: a JSON object with an integer 'step' is expected")
        out.append((line, record))
    return out


def _mend(path: Path, dropped: Path, resume_from: int | None) -> None:
    """Leave in `path` the whole lines before `resume_from`, each ended by a newline; move the rest to `dropped`."""
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
        # Written before the log is replaced: a crash in between repeats lines here and loses none.
        _write(dropped, "ab", b"".join(line + b"\n" for line in gone))
    new = path.with_name(path.name + ".new")
    _write(new, "wb", whole)
    new.replace(path)


def _stays(record: dict[str, Any], resume_from: int | None) -> bool:
    """A step record tells of the step of its number, an evaluation or attribution of the weights after that many steps.

    A run that starts over from 0 evaluates again.
    """
    if resume_from is None or record["step"] < resume_from:
        return True
    return record.get("kind") in ("eval", "attribution") and 0 < record["step"] == resume_from


def _write(path: Path, mode: str, content: bytes) -> None:
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _plain(key: str, value: Any) -> Any:
    """A JSON value: tensor and array scalars unpacked, numbers that are not finite as None."""
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

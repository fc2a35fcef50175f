"""The run log: one JSON object per line, written to disk before the loop continues, then passed to the loggers.

The plots of a report use only `log.jsonl`. Records are flat, with slash-separated keys. Every record has a `step`
(int) and a `kind` ("step", "eval", "erpd" or "attribution").
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_rl.diagnostics.logger import Logger
from megatron_rl.diagnostics.step_lines import cut_back, read_lines
from megatron_rl.errors import UserError

LOG_NAME = "log.jsonl"


class RunLog:
    """Append-only log of one run. A second RunLog on the same folder continues it.

    `resume_from` is the first step that will run again. Records from this step on are moved to `log.dropped.jsonl`. So
    is a last line that is incomplete because the previous process died. Nothing is deleted. `guard` is called before
    anything is written; it raises if this process may not write.
    """

    def __init__(
        self, folder: Path | str, resume_from: int | None = None, guard: Callable[[], None] = lambda: None
    ) -> None:
        folder, self._guard = Path(folder), guard
        guard()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_NAME
        cut_back(self.path, lambda record: stays_after_resume(record, resume_from))
        self._file = self.path.open("ab")
        self._loggers: list[tuple[str, Logger]] = []

    def add_logger(self, name: str, logger: Logger) -> None:
        """Pass all further records to a logger, and close it with this log. `name` is its name in messages."""
        self._loggers.append((name, logger))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, wait until it is on disk, and pass it to every logger.

        Numbers that are not finite become null.

        Raises:
            UserError: the record has no integer `step`, or a value is not a number, text, bool, None or a list of
                numbers; or a logger raised. The message then names the logger and the step.
        """
        row = {key: _plain(key, value) for key, value in record.items()}
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise UserError(f"a log record needs an integer 'step', got {step!r}")
        self._guard()
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, logger in self._loggers:
            try:
                logger.log(dict(row))  # a copy: what a logger does with it must not reach the next one
            except Exception as error:  # a logger may raise anything
                raise UserError(
                    f"logger {name} failed on the {row.get('kind')} record of step {step} ({_text(error)}): "
                    f"{self.path} has that record and all before it; fix the logger or take it out of run.loggers, "
                    "then --resume"
                ) from error

    def close(self) -> None:
        """Close the log and every logger. Raise UserError for the first logger that could not be closed."""
        self._file.close()
        failed = None
        for name, logger in self._loggers:
            try:
                logger.close()
            except Exception as error:  # noqa: BLE001  a logger may raise anything, and the next ones must be closed
                failed = failed or UserError(
                    f"logger {name} failed while it was closed ({_text(error)}): {self.path} is complete"
                )
                failed.__cause__ = failed.__cause__ or error
        if failed is not None:
            raise failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError as failed:
            if error is None:
                raise
            print(f"warning: {failed}", file=sys.stderr, flush=True)  # the error that ends the run is the one to show


def read_log(folder: Path | str) -> list[dict[str, Any]]:
    """Return the records of a run in the order they were written, without an incomplete last line.

    Raises:
        UserError: there is no log, or another line is malformed; the message names file:line.
    """
    path = Path(folder) / LOG_NAME
    if not path.is_file():
        raise UserError(f"no run log at {path}")
    return [record for _, record in read_lines(path)]


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def stays_after_resume(record: dict[str, Any], resume_from: int | None) -> bool:
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

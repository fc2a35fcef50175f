"""Append-only files of a run: one JSON object per line, each with an integer `step`, cut back when the run resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import append_file, parse_json, replace_file

StepLine = dict[str, Any]


def read_lines(path: Path) -> list[tuple[bytes, StepLine]]:
    """Return (line, record) of every complete line.

    Raises:
        UserError: a line other than the last is malformed; the message names file:line.
    """
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a JSON object ({error}); fix or remove the line") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}:{number}: a JSON object with an integer 'step' is expected")
        out.append((line, record))
    return out


def cut_back(path: Path, stays: Callable[[StepLine], bool]) -> None:
    """Keep in `path` the complete lines whose record stays, each ended by a newline.

    The other lines are moved to `<stem>.dropped.jsonl`, and so is an incomplete last line. Nothing is deleted. A file
    that does not exist is left alone.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    records = read_lines(path)
    kept = [line for line, record in records if stays(record)]
    gone = [line for line, record in records if not stays(record)]
    torn = content[sum(len(line) + 1 for line, _ in records) :].strip()
    if torn:
        gone.append(torn)
    whole = b"".join(line + b"\n" for line in kept)
    if whole == content:
        return
    if gone:
        # Written before the file is replaced: a crash in between duplicates dropped lines but loses none.
        append_file(path.with_suffix(".dropped.jsonl"), b"".join(line + b"\n" for line in gone))
    replace_file(path, whole)

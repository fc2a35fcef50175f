"""Rows of a JSONL or parquet file, each with its file:line."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError

MISSING = object()


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file:line, row) for every row. Lines, and rows of a parquet file, count from 1."""
    if path.suffix == ".parquet":
        import pyarrow as pa  # here, because it starts a thread, and most data is JSONL
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file: {error}") from error
        yield from ((f"{path}:{number}", row) for number, row in enumerate(table.to_pylist(), start=1))
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{place}: not a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: a JSON object is expected, found {type(row).__name__}")
        yield place, row


def find_column(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, or MISSING. `a.b` is key b of column a, unless a column has that very name."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def text_cell(place: str, row: Mapping[str, Any], column: str, key: str) -> str:
    """Return the text of a row's column.

    Args:
        place: file:line of the row.
        row: the row.
        column: name of the column, or a dotted path.
        key: key of the configuration that names the column.

    Raises:
        UserError: there is no such column, or it holds no text.
    """
    return _text(place, _found(place, row, column, key), column, "text is")


def prompt_cell(place: str, row: Mapping[str, Any], column: str, key: str) -> str | tuple[dict[str, Any], ...]:
    """Return the text or the chat messages of a row's column; arguments and errors are those of `text_cell`."""
    value = _found(place, row, column, key)
    if not isinstance(value, list):
        return _text(place, value, column, "text or chat messages are")
    for at, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{place}: message {at + 1} of '{column}' is {message!r}; it needs texts role and content")
    if not value or value[-1]["role"] == "assistant":
        raise UserError(f"{place}: '{column}' must end with a message of the user, which the model answers")
    # The columns of a Parquet file are the same in every row: a key that one message has is None in the others.
    return tuple({key: part for key, part in message.items() if part is not None} for message in value)


def _found(place: str, row: Mapping[str, Any], column: str, key: str) -> Any:
    value = find_column(row, column)
    if value is MISSING:
        raise UserError(f"{place}: '{column}' is missing (columns here: {', '.join(map(str, row))}); set {key}")
    return value


def _text(place: str, value: Any, column: str, expected: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: '{column}' is {value!r}; {expected} expected")
    return value

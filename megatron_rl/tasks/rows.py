"""Rows of a JSONL or parquet file, each with its file:line."""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MISSING = object()
LONGEST_LINE = 16 << 20  # bytes


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file:line, row) for every row. Lines, and rows of a parquet file, count from 1.

    Raises UserError if there is no such file, or it cannot be read; for a row, with its file:line.
    """
    try:
        if not path.is_file():
            raise UserError(f"no data file at {path}; task.data and task.eval_data must name JSONL or parquet files")
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path)
        else:
            yield from _json_rows(path)
    except OSError as error:
        raise UserError(
            f"{reprlib.repr(str(path))} cannot be read ({error.strerror or error}); task.data and task.eval_data must "
            "name JSONL or parquet files that this user may read"
        ) from error


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                raise UserError(
                    f"{place}: the line is longer than {LONGEST_LINE >> 20} MiB; remove it, or put every row on a "
                    "line of its own"
                )
            if line.strip():
                yield place, _json_row(place, line)


def _json_row(place: str, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise UserError(f"{place}: the JSON is nested too deep to be read; correct or remove the line") from error
    except ValueError as error:  # also broken UTF-8, and whole numbers with thousands of digits
        raise UserError(f"{place}: not a JSON object ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: a JSON object is expected, found {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa  # here, because it starts a thread, and most data is JSONL
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from error
    for number in range(table.num_rows):
        place = f"{path}:{number + 1}"
        yield (
            place,
            {name: _parquet_cell(place, name, table.column(at)[number]) for at, name in enumerate(table.column_names)},
        )


def _parquet_cell(place: str, column: str, cell: "pa.Scalar") -> Any:
    try:
        value = cell.as_py()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, and dates that Python cannot hold
        raise UserError(
            f"{place}: '{column}' holds a {cell.type} that cannot be read ({error}); correct the row, or write the "
            "file without this column"
        ) from error
    return _shortest(value, cell.type)


def _shortest(value: Any, kind: "pa.DataType") -> Any:
    """Return a number of a narrow column as it was written, 0.1 and not 0.10000000149011612, also inside a struct."""
    if isinstance(value, dict) and hasattr(kind, "field"):
        return {name: _shortest(part, kind.field(name).type) for name, part in value.items()}
    if not isinstance(value, float) or str(kind) not in ("float", "halffloat"):
        return value
    import numpy as np  # here, because only narrow columns need it

    return float(str((np.float32 if str(kind) == "float" else np.float16)(value)))


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
    """Return the text of a row's column. A number is written out, without an exponent.

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
            raise UserError(
                f"{place}: message {at + 1} of '{column}' is {reprlib.repr(message)}; it needs texts role and content"
            )
        for part in ("role", "content"):
            _check_characters(place, column, message[part])
    if not value or value[-1]["role"] == "assistant":
        raise UserError(f"{place}: '{column}' must end with a message of the user, which the model answers")
    if not value[-1]["content"].strip():
        raise UserError(f"{place}: the last message of '{column}' is empty, so it asks nothing")
    # The columns of a Parquet file are the same in every row: a key that one message has is None in the others.
    return tuple({key: part for key, part in message.items() if part is not None} for message in value)


def _found(place: str, row: Mapping[str, Any], column: str, key: str) -> Any:
    value = find_column(row, column)
    if value is MISSING:
        known = reprlib.aRepr.repr_str(", ".join(map(str, row)), 0) if len(row) > 50 else ", ".join(map(str, row))
        raise UserError(f"{place}: '{column}' is missing (columns here: {known}); set {key}")
    return value


def _text(place: str, value: Any, column: str, expected: str) -> str:
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{place}: '{column}' is {value}, which is no number; correct or remove the row")
        # Not str: it writes 0.00005 as 5e-05.
        value = format(Decimal(str(value)), "f")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: '{column}' is {reprlib.repr(value)}; {expected} expected")
    _check_characters(place, column, value)
    return value


def _check_characters(place: str, column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: '{column}' holds half of a surrogate pair ({text[error.start]!r} at character "
            f"{error.start + 1}), which no tokenizer reads; correct or remove the row"
        ) from error

"""Rows of a JSONL or parquet file, each with its file:line."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError


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


def text_cell(place: str, row: Mapping[str, Any], column: str, key: str) -> str:
    """Return the text of a row's column. Raise UserError, with `place`, if there is none; `key` names the column."""
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.strip():
        return value
    if column in row:
        raise UserError(f"{place}: '{column}' is {value!r}; text is expected")
    raise UserError(f"{place}: '{column}' is missing (columns here: {', '.join(map(str, row))}); set {key}")

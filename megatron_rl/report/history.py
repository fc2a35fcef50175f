"""The columns of a run log, in the form that plots and tables use."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.diagnostics import read_log
from megatron_rl.errors import UserError


@dataclass(frozen=True)
class Series:
    """One key of a run log: steps [n] int64 and values [n] float64, from the records in which it is a number."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class History:
    """All records of one run. A lookup of a key uses the records that contain it, whatever their kind."""

    name: str
    records: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, run_folder: Path) -> "History":
        """Read the history of a run.

        Raises:
            UserError: the folder has no log, or the log has no record.
        """
        records = tuple(read_log(run_folder))
        if not records:
            raise UserError(f"the run log in {run_folder} is still empty: there is nothing to report")
        return cls(run_folder.resolve().name, records)

    def column(self, key: str) -> Series:
        found = [(r["step"], r[key]) for r in self.records if _is_number(r.get(key))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))

    def table(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return steps [n] and values [len(keys), n] of the records in which every key is a number."""
        rows = [r for r in self.records if all(_is_number(r.get(key)) for key in keys)]
        values = np.array([[r[key] for r in rows] for key in keys], dtype=np.float64).reshape(len(keys), len(rows))
        return np.array([r["step"] for r in rows], dtype=np.int64), values

    def has(self, *keys: str) -> bool:
        """Return True if at least one record contains all the keys."""
        return any(all(_is_number(r.get(key)) for key in keys) for r in self.records)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

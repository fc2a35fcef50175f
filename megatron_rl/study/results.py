"""The results of a study: tables that every figure and sentence of its report is made from.

    results/study.json         what the study is
    results/cells.json         state, exit code and provenance of every cell
    results/evals.parquet      held-out rewards: a row for each evaluation and prompt
    results/steps.parquet      the numbers of the run logs: a row for each step
    results/parts/             the tables of each cell that is done; they are written once

A cell counts up to the evaluation at which its budget is spent.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.diagnostics import read_log
from megatron_rl.diagnostics.evaluations import Evaluation, read_evaluations
from megatron_rl.errors import UserError
from megatron_rl.files import replace_file
from megatron_rl.launch.conductor.control_files import read_json_lines
from megatron_rl.study.cell_status import DONE, CellState, read_states
from megatron_rl.study.study_folder import Record, StudyFolder, read_part
from megatron_rl.trainer.provenance import PROVENANCE_NAME

TABLES = ("evals", "steps")
# Columns of steps.parquet with a name of their own, and the log key that each has; other numbers keep their log key.
NAMES = {
    "tokens": "tokens/total",
    "seconds": "seconds/total",
    "reward": "reward/mean",
    "mismatch_k3": "mismatch/kl/k3",
    "k3": "kl/k3",
    "max_ratio": "ratio/max",
}
_Rows = list[dict[str, Any]]


def collect_results(folder: StudyFolder) -> list[CellState]:
    """Write the tables from the run folders, and return the state of every cell.

    A cell that is done is read once. Its run folder may be removed afterwards.

    Raises:
        UserError: the study has no record, or a file of a run is malformed.
    """
    record = folder.record()
    states = read_states(folder, record)
    parts = folder.results / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
    cells: dict[str, Any] = {}
    for state in states:
        about = folder.part(state.cell)
        if about.is_file():
            cells[state.cell] = read_part(folder, state.cell)
            found = {name: _read_table(parts / f"{state.cell}.{name}.parquet", about) for name in TABLES}
        else:
            provenance = read_json_lines(str(folder.run(state.cell) / PROVENANCE_NAME))
            cells[state.cell] = _describe(record["cells"][state.cell], state, provenance)
            found = _tables(folder.run(state.cell), state.cell, record, provenance)
            if state.status == DONE:
                for name, table in found.items():
                    _write_table(table, parts / f"{state.cell}.{name}.parquet")
                _write_json(about, cells[state.cell])
        for name, table in found.items():
            tables[name].append(table)
    for name, all_of_them in tables.items():
        _write_table(pa.concat_tables(all_of_them, promote_options="default"), folder.results / f"{name}.parquet")
    _write_json(folder.results / "cells.json", cells)
    _write_json(folder.results / "study.json", record)
    return states


def _read_table(path: Path, about: Path) -> pa.Table:
    """Return a table of a finished cell. Raises UserError that names `about`, the file that says the cell was read."""
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove {about}, and the results are made again from the run folder"
        ) from error


def _describe(about: Record, state: CellState, provenance: _Rows) -> Record:
    """Return what cells.json says of a cell. Its provenance is that of its last start; `starts` has all."""
    last = provenance[-1] if provenance else None
    return {**about, **vars(state), "provenance": last, "starts": provenance}


def counted_evaluations(run: Path, budget: Record) -> list[Evaluation]:
    """Return the evaluations of a run that its study counts: those up to the end of the budget."""
    end = _end_of_budget(_step_rows(run), budget)
    return [one for one in read_evaluations(run) if one.step <= end]


def _step_rows(run: Path) -> _Rows:
    return [row for row in read_log(run) if row.get("kind") == "step"] if (run / "log.jsonl").is_file() else []


def _tables(run: Path, cell: str, record: Record, provenance: _Rows) -> dict[str, pa.Table]:
    about = record["cells"][cell]
    first = {"cell": cell, "arm": about["arm"], **{f"axis.{name}": value for name, value in about["axes"].items()}}
    last = provenance[-1] if provenance else {}
    first |= {"size": int(last.get("parameters", 0)) if record["size_axis"] else 0, "seed": about["seed"]}
    steps = _step_rows(run)
    end = _end_of_budget(steps, record["budget"])
    metric = record["verdict"]["metric"]
    evals = counted_evaluations(run, record["budget"])
    return {
        "evals": _table(
            [{**first, **row} for evaluation in evals for row in _prompts(evaluation, metric)],
            _types(first) | dict.fromkeys(("step", "prompt", "samples"), pa.int64()) | {"prompt_id": pa.string()},
            ("reward", "variance"),
        ),
        "steps": _table(
            [{**first, **_numbers(row, int(last.get("gpus", 0)) or 1)} for row in steps if row["step"] < end],
            {**_types(first), "step": pa.int64()},
            (*NAMES, "gpu_seconds"),
        ),
    }


def _end_of_budget(steps: Sequence[Record], budget: Record) -> float:
    """Return the number of steps whose tokens and seconds lie within the budget; inf if all do."""
    tokens = seconds = 0.0
    for row in steps:
        tokens += float(row.get("tokens/total") or 0)
        seconds += float(row.get("seconds/total") or 0)
        limits = ((budget["tokens"], tokens), (budget["seconds"], seconds))
        if any(limit is not None and value > limit for limit, value in limits):
            return float(row["step"])
    return float("inf")


def _prompts(evaluation: Evaluation, metric: str) -> _Rows:
    """Return a row for each held-out prompt: mean and sample variance of its rewards."""
    rewards = evaluation.sampled if metric == "sampled" else [[one] for one in evaluation.greedy]
    return [
        {
            "step": evaluation.step,
            "prompt": prompt,
            "prompt_id": evaluation.prompts[prompt],
            "samples": len(values),
            "reward": float(np.mean(values)),
            "variance": float(np.var(values, ddof=1)) if len(values) > 1 else None,
        }
        for prompt, values in enumerate(rewards)
    ]


def _numbers(row: Record, gpus: int) -> Record:
    """Return the numbers of a step's record; on CPUs one device counts as a GPU."""
    numbers = {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "version")
    }
    named = {name: numbers.get(key) for name, key in NAMES.items()}
    return {"step": row["step"], **numbers, **named, "gpu_seconds": numbers.get("seconds/total", 0.0) * gpus}


def _types(first: Record) -> dict[str, pa.DataType]:
    return {name: pa.int64() if isinstance(value, int) else pa.string() for name, value in first.items()}


def _table(rows: _Rows, types: dict[str, pa.DataType], numbers: Sequence[str]) -> pa.Table:
    """Return a table of rows. Columns without a type are floats; a value that is absent is null."""
    names = dict.fromkeys([*types, *numbers, *(name for row in rows for name in row)])
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in names])
    return pa.Table.from_pylist(rows, schema=schema)


def _write_table(table: pa.Table, path: Path) -> None:
    replace_file(path, lambda file: pq.write_table(table, file))


def _write_json(path: Path, content: Any) -> None:
    replace_file(path, json.dumps(content, indent=1).encode() + b"\n")

"""The state of every cell of a study: from its run folder, the record of its attempts, and Slurm."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rl.diagnostics import read_log
from megatron_rl.errors import ExitCode
from megatron_rl.launch.conductor.control_files import read_json
from megatron_rl.launch.conductor.slurm_states import FORGOTTEN
from megatron_rl.launch.job_of_folder import job_of
from megatron_rl.study.study_folder import Record, StudyFolder, read_part
from megatron_rl.trainer.run_control import RunControl

DONE, RUNNING, STOPPED, FAILED, MISSING = STATES = ("done", "running", "stopped", "failed", "missing")
_AGAIN = (ExitCode.DONE, ExitCode.RETRY, ExitCode.INTERRUPTED)
_SIGNALS = 128
_TAIL = 1 << 14
_WIDE = 1000  # columns where there is no terminal: nothing is folded


@dataclass(frozen=True)
class CellState:
    """What is known about a cell.

    Attributes:
        cell: its id.
        status: done; running; stopped: it has begun and can go on; failed: it ended with an error that the same command
            meets again; missing: it has not begun.
        steps: number of whole steps in its log.
        tokens: tokens of these steps, prompts included.
        seconds: seconds of these steps.
        exit_code: exit code of its last command; None if none is recorded.
        error: last line that its last command printed, if it failed.
    """

    cell: str
    status: str
    steps: int
    tokens: float
    seconds: float
    exit_code: int | None
    error: str


def read_states(folder: StudyFolder, record: Record) -> list[CellState]:
    """Return the state of every cell, in the order of the study."""
    last = {attempt["cell"]: attempt["code"] for attempt in folder.attempts()}
    # While Slurm does not respond, the tasks of an array count as running: they must not be started twice.
    running, queued = _running(folder), job_of(folder.runs)[1] != FORGOTTEN
    return [_read_state(folder, record, cell, last.get(cell), cell in running, queued) for cell in record["cells"]]


def _read_state(
    folder: StudyFolder, record: Record, cell: str, code: int | None, runs_here: bool, queued: bool
) -> CellState:
    if folder.part(cell).is_file():  # its results are written; the run folder may be gone
        found = read_part(folder, cell)
        return CellState(**{field.name: found[field.name] for field in fields(CellState)})
    run, budget = folder.run(cell), record["budget"]
    steps, tokens, seconds = spent(run)
    is_done = (RunControl(run).done_steps() or 0) >= budget["steps"] or over_budget(budget, tokens, seconds)
    state, launched = "", _launched(run, queued)
    if runs_here or (launched == RUNNING and not is_done):
        state = RUNNING
    elif is_done:
        state = DONE
    elif launched == FAILED or (code is not None and code not in _AGAIN and code <= _SIGNALS):
        state = FAILED
    else:
        state = STOPPED if steps or code is not None else MISSING
    error = _last_line(folder.output(cell)) if state == FAILED else ""
    return CellState(cell, state, steps, tokens, seconds, code, error)


def spent(run: Path) -> tuple[int, float, float]:
    """Return steps, tokens and seconds of steps in the log of a run folder."""
    if not (run / "log.jsonl").is_file():
        return 0, 0.0, 0.0
    steps = [row for row in read_log(run) if row.get("kind") == "step"]
    tokens, seconds = (sum(float(row.get(key) or 0) for row in steps) for key in ("tokens/total", "seconds/total"))
    return len(steps), tokens, seconds


def over_budget(budget: Record, tokens: float, seconds: float) -> bool:
    """Return whether a run has spent its budget of tokens or seconds.

    Args:
        budget: the study's budget, with a limit or None for each.
        tokens: tokens of the run's steps, prompts included.
        seconds: seconds of the run's steps.
    """
    limits = ((budget["tokens"], tokens), (budget["seconds"], seconds))
    return any(limit is not None and value >= limit for limit, value in limits)


def _running(folder: StudyFolder) -> list[str]:
    """Return the cells that a pool runs now."""
    if not folder.is_locked():
        return []
    try:
        found = json.loads((folder.folder / "running.json").read_bytes())
    except FileNotFoundError:  # a command that has just begun runs no cell yet
        return []
    return [str(cell) for cell in found]


def _launched(run: Path, queued: bool) -> str:
    """Return the state of a task of the array: running, failed, or "" if it is neither."""
    if not (run / "launch").is_dir():
        return ""
    result = read_json(str(run / "control" / "result.json"))
    if result is None:
        return RUNNING if queued else ""
    return FAILED if result.get("code") not in _AGAIN else ""


def _last_line(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def print_cells(record: Record, states: Sequence[CellState] | None = None) -> None:
    """Print a table of the cells, with their states if they are given, and a line with the numbers."""
    axes = list(next(iter(record["cells"].values()))["axes"])
    table = Table()
    for name in ("cell", *axes, "seed", *(["state", "steps", "tokens", "seconds", ""] if states else [])):
        table.add_column(name, overflow="fold")
    by_cell = {state.cell: state for state in states or ()}
    for cell, about in record["cells"].items():
        row = [cell, *(about["axes"][axis] for axis in axes), str(about["seed"])]
        if cell in by_cell:
            row += _status_row(by_cell[cell], record["budget"]["steps"])
        table.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)
    print(count_line(record, states))


def count_line(record: Record, states: Sequence[CellState] | None) -> str:
    """Return how many cells there are, and how many of each state."""
    line = f"{len(record['cells'])} cells: {len(record['arms'])} arms, {len(record['seeds'])} seeds"
    if states is None:
        return line
    counts = {state: sum(one.status == state for one in states) for state in STATES}
    return f"{line}; " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def _status_row(state: CellState, steps: int) -> list[str]:
    why = f"exit code {state.exit_code}: {state.error}" if state.status == FAILED else ""
    return [state.status, f"{state.steps} / {steps}", f"{state.tokens:.3g}", f"{state.seconds:.0f}", why]

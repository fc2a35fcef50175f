"""The folder of a study: its record, the configurations of its cells, attempts and results. One study, one folder.

study.json          what the study is, with a digest of every cell
study.yaml          the study file as it was read last
plans/CELL.yaml     the configuration of every cell
runs/CELL/          the run folders; runs/CELL.out is what their commands print
attempts.jsonl      every start of a cell and how it ended
results/            tables that `report` reads; `results.py` writes them
"""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xxhash
import yaml

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.files import parse_json, replace_file, try_lock
from megatron_rl.launch.conductor.control_files import append_line, read_json_lines
from megatron_rl.study.cell_checks import ResolvedCell
from megatron_rl.study.grid import RUNS, arms_of
from megatron_rl.study.study_file import Study

LOCK_WAIT_S = 3.0  # another command may look at the lock for a moment
Record = dict[str, Any]


class StudyFolder:
    """The files of a study in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plans, self.runs, self.results = folder / "plans", folder / RUNS, folder / "results"

    def plan(self, cell: str) -> Path:
        """Return the configuration file of a cell."""
        return self.plans / f"{cell}.yaml"

    def run(self, cell: str) -> Path:
        """Return the run folder of a cell."""
        return self.runs / cell

    def output(self, cell: str) -> Path:
        """Return the file with what the commands of a cell printed."""
        return self.runs / f"{cell}.out"

    def part(self, cell: str) -> Path:
        """Return the file of a cell's results, which is written once, when the cell is done."""
        return self.results / "parts" / f"{cell}.json"

    def record(self) -> Record:
        """Return the record of the study.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        absent = f"{self.folder} holds no study: `megatron-rl study run` makes one"
        return read_mapping(self.folder / "study.json", absent, "restore it")

    def attempts(self) -> list[Record]:
        """Return every recorded end of a cell's command, in order."""
        return read_json_lines(str(self.folder / "attempts.jsonl"))

    def add_attempt(self, **record: Any) -> None:
        """Record the end of a cell's command."""
        append_line(str(self.folder / "attempts.jsonl"), record)

    def lock(self, stack: ExitStack) -> None:
        """Keep other commands from running this study until the stack closes. Raises ConfigError if one does."""
        deadline = time.monotonic() + LOCK_WAIT_S
        while (lock := try_lock(self.folder / "in-use")) is None:
            if time.monotonic() > deadline:
                raise ConfigError(f"{self.folder} is in use by another `study run`: wait for it, or end it")
            time.sleep(0.05)
        stack.callback(lock.release)
        (self.folder / "running.json").unlink(missing_ok=True)  # of a command that was killed

    def is_locked(self) -> bool:
        """Return whether a command runs this study now."""
        if not self.folder.is_dir():
            return False
        lock = try_lock(self.folder / "in-use")
        if lock is None:
            return True
        lock.release()
        return False

    def make(self) -> None:
        """Make the folder. Raises ConfigError if it cannot be made."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder of the study, {self.folder}, cannot be made ({error})") from error

    def write(self, new: Record, cells: Sequence[ResolvedCell], source: Path, *, extend: bool) -> None:
        """Write the record and the configurations of all cells. A folder with results takes the same study alone.

        Args:
            new: the record of the study, from `make_record`; its history is completed.
            cells: its cells.
            source: the study file.
            extend: add cells to a study that has results, or change its verdict; it is recorded that this was done.

        Raises:
            ConfigError: the study has results of another configuration.
        """
        new["history"] = self.check(new, cells, extend=extend)
        if not new["history"] or new["history"][-1]["digest"] != new["digest"]:
            entry = {"time": time.time(), "digest": new["digest"], "cells": len(cells), "verdict": new["verdict"]}
            new["history"].append(entry)
        self.plans.mkdir(parents=True, exist_ok=True)
        wanted = {self.plan(one.cell.id): yaml.safe_dump(one.cell.tree, sort_keys=False) for one in cells}
        for path in set(self.plans.glob("*.yaml")) - set(wanted):
            path.unlink()
        for path, text in wanted.items():
            replace_file(path, text.encode())
        replace_file(self.folder / "study.json", json.dumps(new, indent=1).encode() + b"\n")
        replace_file(self.folder / "study.yaml", source.read_bytes())  # the source may be this very file

    def check(self, new: Record, cells: Sequence[ResolvedCell], *, extend: bool) -> list[Record]:
        """Check that the folder takes a study, and return the history of the study in it; [] without results.

        Raises:
            ConfigError: it has results of another configuration.
        """
        old = self.record() if (self.folder / "study.json").is_file() else None
        if old is None or not self._has_results(old["cells"]):
            return []
        for one in cells:
            known = old["cells"].get(one.cell.id, {})
            if known.get("digest") == one.former_digest:
                known["digest"] = one.digest
        _check_same(self.folder, old, new, extend=extend)
        history: list[Record] = old["history"]
        if history and history[-1]["digest"] == old["digest"]:
            history[-1]["digest"] = _digest(old)
        return history

    def _has_results(self, cells: Iterable[str]) -> bool:
        return any((self.run(cell) / "log.jsonl").is_file() for cell in cells) or self.results.is_dir()


def make_record(study: Study, cells: Sequence[ResolvedCell]) -> Record:
    """Return the content of study.json, without a history."""
    described = {
        one.cell.id: {
            "arm": one.cell.arm,
            "axes": dict(one.cell.axes),
            "size": one.cell.size,
            "seed": one.cell.seed,
            "digest": one.digest,
        }
        for one in cells
    }
    record = {
        "name": study.name,
        "arms": arms_of([one.cell for one in cells]),
        "size_axis": study.size,
        "seeds": list(study.seeds),
        "budget": study.budget.model_dump(),
        "paired": study.paired,
        "verdict": study.verdict.model_dump(),
        "cells": described,
    }
    return {"digest": _digest(record), **record, "history": []}


def _digest(record: Record) -> str:
    about = {key: value for key, value in record.items() if key not in ("digest", "history")}
    return xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())


def read_part(folder: StudyFolder, cell: str) -> Record:
    """Return what the results of a finished cell say of it. Raises UserError if they are damaged."""
    mend = "remove it, and the results are made again from the run folder"
    return read_mapping(folder.part(cell), f"{folder.part(cell)} is gone", mend)


def read_mapping(path: Path, absent: str, mend: str) -> Record:
    """Return the mapping in a JSON file.

    Args:
        path: the file.
        absent: what to say if there is no file.
        mend: how to mend a file that cannot be read.

    Raises:
        UserError: there is no file, or it holds no mapping.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(absent) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {mend}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping: {mend}")
    return content


def _check_same(folder: Path, old: Record, new: Record, *, extend: bool) -> None:
    """Raise ConfigError if a study that has results would be mixed with another one."""
    before, after = old["cells"], new["cells"]
    gone = [cell for cell in before if cell not in after]
    changed = [cell for cell in after if cell in before and before[cell] != after[cell]]
    added = [cell for cell in after if cell not in before]
    other = [key for key in ("budget", "paired", "size_axis") if old[key] != new[key]]
    rest = "take another folder for the new study, or put the old settings back"
    if gone:
        raise ConfigError(
            f"{folder} has results, and {len(gone)} of its cells are no longer in the study ({_some(gone)}): a report "
            f"would hide them; {rest}"
        )
    if changed:
        raise ConfigError(
            f"{folder} has results, and {len(changed)} of its cells now have another configuration, model or data "
            f"({_some(changed)}): results of both would be mixed; {rest}"
        )
    if other:
        raise ConfigError(f"{folder} has results, and {', '.join(other)} of the study has changed; {rest}")
    judged = old["verdict"] != new["verdict"]
    if (added or judged) and not extend:
        what = [f"{len(added)} new cells ({_some(added)})"] * bool(added) + ["another verdict"] * judged
        raise ConfigError(
            f"{folder} has results, and the study now has {' and '.join(what)}: pass --extend if that is meant; "
            "the report will say that it was done with results at hand"
        )


def _some(cells: Sequence[str]) -> str:
    return ", ".join(cells[:5]) + (", ..." if len(cells) > 5 else "")

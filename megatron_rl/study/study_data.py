"""The tables of a study as arrays: one group for each arm and size, with its seeds side by side."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.errors import UserError
from megatron_rl.study.cell_status import DONE
from megatron_rl.study.study_folder import read_mapping

_MEND = "restore it, or run the study again"
_KEYS = ("cell", "arm", "size", "seed")
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class CellCurve:
    """What one finished cell measured.

    Attributes:
        cell: its id.
        seed: its seed.
        steps: steps of its evaluations, ascending, [n].
        prompts: numbers of the held-out prompts, ascending, [p].
        reward: mean reward over samples, [n, p].
        chance: variance of that mean by sampling alone, [n, p]; NaN for a prompt with one sample.
        log: columns of its steps, [steps] each.
    """

    cell: str
    seed: int
    steps: np.ndarray
    prompts: np.ndarray
    reward: np.ndarray
    chance: np.ndarray
    log: Columns

    def column(self, name: str) -> np.ndarray:
        """Return a column of the steps; NaN if the log does not have it."""
        return self.log.get(name, np.full(len(self.log["step"]), np.nan))

    def compute(self, unit: str) -> np.ndarray:
        """Return what was spent before each evaluation, [n]: steps, tokens, seconds or gpu_seconds."""
        if unit == "steps":
            return self.steps.astype(np.float64)
        spent = np.concatenate([[0.0], np.cumsum(self.column(unit))])
        return spent[np.searchsorted(self.log["step"], self.steps)]


@dataclass(frozen=True)
class ArmRuns:
    """All finished cells of one arm at one size, in the order of their seeds.

    Attributes:
        arm: name of the arm.
        size: name of the size, "" in a study of one size.
        parameters: number of parameters of the model; 0 in a study of one size.
        curves: the cells.
    """

    arm: str
    size: str
    parameters: int
    curves: tuple[CellCurve, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds that are done."""
        return [curve.seed for curve in self.curves]

    @cached_property
    def steps(self) -> np.ndarray:
        """The steps at which every seed was evaluated."""
        common = set(self.curves[0].steps.tolist())
        for curve in self.curves[1:]:
            common &= set(curve.steps.tolist())
        return np.array(sorted(common), dtype=np.int64)

    def of(self, seeds: list[int]) -> "ArmRuns":
        """Return the group of some of its seeds, in their order."""
        by_seed = {curve.seed: curve for curve in self.curves}
        return ArmRuns(self.arm, self.size, self.parameters, tuple(by_seed[seed] for seed in seeds))

    def last(self) -> np.ndarray:
        """Return the rewards of each seed's last evaluation, [seeds, prompts]."""
        return np.stack([curve.reward[-1] for curve in self.curves])

    def last_chance(self) -> np.ndarray:
        """Return the sampling variance of the last evaluation, [seeds, prompts]."""
        return np.stack([curve.chance[-1] for curve in self.curves])

    def rewards(self) -> np.ndarray:
        """Return the mean held-out reward at the common steps, [seeds, n]."""
        return np.stack([curve.reward.mean(1)[np.isin(curve.steps, self.steps)] for curve in self.curves])

    def compute(self, unit: str) -> np.ndarray:
        """Return what each seed spent before the common steps, [seeds, n]."""
        return np.stack([curve.compute(unit)[np.isin(curve.steps, self.steps)] for curve in self.curves])

    def logged(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps that every seed logged, [n], and a column at them, [seeds, n]."""
        common = set(self.curves[0].log["step"].tolist())
        for curve in self.curves[1:]:
            common &= set(curve.log["step"].tolist())
        steps = np.array(sorted(common), dtype=np.int64)
        return steps, np.stack([curve.column(name)[np.isin(curve.log["step"], steps)] for curve in self.curves])


@dataclass(frozen=True)
class StudyData:
    """Everything that a verdict is made from.

    Attributes:
        record: study.json, which says what the study is.
        cells: cells.json: the state and provenance of every cell.
        groups: finished cells by (size, arm), in the order of the study.
    """

    record: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    groups: Mapping[tuple[str, str], ArmRuns]

    @classmethod
    def of(cls, folder: Path) -> "StudyData":
        """Read the results of a study.

        Raises:
            UserError: a file is missing or malformed, or cells that are compared answered different prompts.
        """
        results = folder / "results"
        files = (results / "study.json", results / "cells.json")
        record, cells = (read_mapping(path, _no_results(path), _MEND) for path in files)
        evals, steps = _by_cell(results / "evals.parquet"), _by_cell(results / "steps.parquet")
        done = [cell for cell, about in cells.items() if about["status"] == DONE and cell in evals]
        members: dict[tuple[str, str], list[CellCurve]] = {}
        for cell in done:
            key = (cells[cell].get("size", ""), cells[cell]["arm"])
            members.setdefault(key, []).append(_curve(cell, evals[cell], steps.get(cell)))
        parameters = {(cells[cell].get("size", ""), cells[cell]["arm"]): int(evals[cell]["size"][0]) for cell in done}
        order = {arm: at for at, arm in enumerate(record["arms"])}
        groups = {
            key: ArmRuns(key[1], key[0], parameters[key], tuple(sorted(members[key], key=lambda curve: curve.seed)))
            for key in sorted(members, key=lambda key: (parameters[key], key[0], order.get(key[1], 0)))
        }
        _check_prompts(groups.values())
        return cls(record, cells, groups)

    @property
    def sizes(self) -> list[str]:
        """Names of the sizes with finished cells, the smallest first; [""] in a study of one size."""
        return list(dict.fromkeys(size for size, _ in self.groups))

    @property
    def reference(self) -> str | None:
        """The arm with which the others are compared."""
        return self.record["verdict"]["reference"]

    @property
    def configurations(self) -> int:
        """How many configurations were tried: those of this study, seeds aside, and those before it."""
        own = {(about["arm"], about.get("size", "")) for about in self.cells.values()}
        return len(own) + int(self.record["verdict"].get("tried", 0))

    def at_size(self, size: str) -> dict[str, ArmRuns]:
        """Return the groups of one size by arm."""
        return {arm: group for (one, arm), group in self.groups.items() if one == size}

    def not_done(self, arm: str | None = None, size: str | None = None) -> dict[str, dict[str, Any]]:
        """Return the cells that are not done, of one arm and size or of all."""
        return {
            cell: about
            for cell, about in self.cells.items()
            if about["status"] != DONE and arm in (None, about["arm"]) and size in (None, about.get("size", ""))
        }


def _no_results(path: Path) -> str:
    return f"there are no results at {path}: `megatron-rl study run` writes them"


def _by_cell(path: Path) -> dict[str, Columns]:
    """Return the rows of each cell of a table as columns."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(_no_results(path)) from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}): {_MEND}") from error
    absent = [key for key in (*_KEYS, "step") if key not in table.column_names]
    if absent:
        raise UserError(f"{path} has no column {', '.join(absent)}: it is not a table of a study")
    columns = {name: table[name].to_numpy() for name in table.column_names if not name.startswith("axis.")}
    names, index = np.unique(columns["cell"].astype(str), return_inverse=True)
    order = np.argsort(index, kind="stable")
    ends = np.searchsorted(index[order], np.arange(len(names) + 1))
    return {
        str(cell): {name: column[order[ends[at] : ends[at + 1]]] for name, column in columns.items()}
        for at, cell in enumerate(names)
    }


def _curve(cell: str, evals: Columns, log: Columns | None) -> CellCurve:
    steps, at_step = np.unique(evals["step"], return_inverse=True)
    prompts, at_prompt = np.unique(evals["prompt"], return_inverse=True)
    reward = np.full((len(steps), len(prompts)), np.nan)
    reward[at_step, at_prompt] = evals["reward"]
    if np.isnan(reward).any():
        raise UserError(
            f"cell {cell}: an evaluation lacks the reward of {int(np.isnan(reward).any(0).sum())} of {len(prompts)} "
            "prompts, or has one that is not a number; remove the cell's run folder and run the study again"
        )
    chance = np.full(reward.shape, np.nan)
    spread = evals.get("variance")
    chance[at_step, at_prompt] = np.nan if spread is None else spread.astype(np.float64) / evals["samples"]
    if log is None:
        log = {"step": np.zeros(0, dtype=np.int64)}
    order = np.argsort(log["step"], kind="stable")
    return CellCurve(cell, int(evals["seed"][0]), steps, prompts, reward, chance, {k: v[order] for k, v in log.items()})


def _check_prompts(groups: Iterable[ArmRuns]) -> None:
    curves = [curve for group in groups for curve in group.curves]
    for curve in curves[1:]:
        if not np.array_equal(curve.prompts, curves[0].prompts):
            raise UserError(
                f"cells {curves[0].cell} and {curve.cell} answered different held-out prompts "
                f"({len(curves[0].prompts)} and {len(curve.prompts)} of them): their rewards cannot be compared; "
                "give both the same eval section"
            )

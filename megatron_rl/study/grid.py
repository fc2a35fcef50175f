"""The grid of a study: its cells, each with a readable id, from axes, constraints and seeds."""

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.config.code_paths import resolve_code_paths
from megatron_rl.config.load import set_key
from megatron_rl.errors import ConfigError, did_you_mean, shorten
from megatron_rl.study.study_file import Axis, Study

MOST_CELLS = 10_000
RUNS = "runs"  # folder of the run folders, in the study's folder
SEED = "seed"  # in constraints, as an axis; and {seed} in a text
_OWN = ("run.seed", "run.dir", "run.name", "run.steps")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,59}")
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        id: name of its run folder.
        arm: the values of all axes but the size, joined by +; `all` without such axes.
        axes: axis -> name of its value.
        size: name of the value of the size axis, "" without one.
        seed: `run.seed`.
        tree: its configuration as a nested mapping, with the keys that the user set.
    """

    id: str
    arm: str
    axes: Mapping[str, str]
    size: str
    seed: int
    tree: dict[str, Any] = field(repr=False, hash=False)


def make_cells(study: Study, base: Mapping[str, Any], folder: Path) -> list[Cell]:
    """Return the cells of a study in the order of its axes and seeds.

    Args:
        study: the study, with its name and folder.
        base: tree of the base configuration.
        folder: folder of the study file; the user's own code in settings and axes is relative to it.

    Raises:
        ConfigError: an axis, a constraint or a setting is malformed, or no cell is left.
    """
    values = {name: _named_values(name, axis) for name, axis in study.axes.items()}
    count = math.prod(len(named) for named in values.values()) * len(study.seeds)
    if count > MOST_CELLS:
        raise ConfigError(f"axes, seeds: they make {count} cells; a study has at most {MOST_CELLS}")
    shared = _with_settings(copy.deepcopy(dict(base)), study.settings, "settings", study, folder)
    for rule, constraints in (("only", study.only), ("exclude", study.exclude)):
        for number, constraint in enumerate(constraints):
            _check_constraint(f"{rule}[{number}]", constraint, values, study)
    cells = [_cell(study, shared, values, labels, seed, folder) for labels, seed in _kept(study, values)]
    if not cells:
        raise ConfigError("only, exclude: they leave no cell")
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.id, cell)
        if other is not cell:
            raise ConfigError(
                f"axes: two cells would be named {cell.id}: {dict(other.axes)} and {dict(cell.axes)}; write names of "
                "values without '-'"
            )
    return cells


def arms_of(cells: list[Cell]) -> list[str]:
    """Return the names of the arms in their order."""
    return list(dict.fromkeys(cell.arm for cell in cells))


def _kept(study: Study, values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[dict[str, str], int]]:
    for combination in itertools.product(*values.values()):
        labels = dict(zip(values, combination, strict=True))
        for seed in study.seeds:
            point = labels | {SEED: str(seed)}
            kept = not study.only or any(_matches(one, point, values) for one in study.only)
            if kept and not any(_matches(one, point, values) for one in study.exclude):
                yield labels, seed


def _named_values(name: str, axis: Axis) -> dict[str, dict[str, Any]]:
    """Return the settings of each value of an axis by the name of the value."""
    if name == SEED or not name:
        raise ConfigError(f"axes: '{name}' cannot be the name of an axis: seeds have a key of their own")
    if not axis:
        raise ConfigError(f"axes.{name}: it has no values")
    if isinstance(axis, dict):
        named = {label: settings or {} for label, settings in axis.items()}
    else:
        named = {_label(name, value): {name: value} for value in axis}
        if len(named) != len(axis):
            raise ConfigError(f"axes.{name}: a value is given twice")
    for label in named:
        if not _LABEL.fullmatch(label):
            raise ConfigError(
                f"axes.{name}: '{shorten(label)}' cannot name a value, which is part of a folder's name: write the "
                f"axis as `name: {{section.key: value}}`, with names of letters, digits, and . _ = -"
            )
    return named


def _label(name: str, value: Any) -> str:
    if isinstance(value, (dict, list)) or value is None:
        raise ConfigError(f"axes.{name}: {shorten(repr(value))} needs a name: write `name: {{{name}: value}}`")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    is_word = isinstance(value, str) and not _NUMBER.fullmatch(value)
    return text if is_word else f"{name.rpartition('.')[2]}={text}"


def _check_constraint(place: str, constraint: Mapping[str, Any], values: Mapping[str, Any], study: Study) -> None:
    if not constraint:
        raise ConfigError(f"{place}: it names no axis, so it would match every cell")
    for axis, wanted in constraint.items():
        if axis != SEED and axis not in values:
            raise ConfigError(f"{place}: there is no axis '{shorten(axis)}'; {did_you_mean(axis, [*values, SEED])}")
        labels = [str(seed) for seed in study.seeds] if axis == SEED else list(values[axis])
        for one in wanted if isinstance(wanted, list) else [wanted]:
            if _wanted(axis, one, values) not in labels:
                raise ConfigError(f"{place}: {axis} has no value {shorten(str(one))}; {did_you_mean(one, labels)}")


def _wanted(axis: str, one: Any, values: Mapping[str, Any]) -> str:
    """Return the name of the value that a constraint means: it may write the value itself."""
    if axis == SEED or str(one) in values[axis]:
        return str(one)
    return _label(axis, one)


def _matches(constraint: Mapping[str, Any], point: Mapping[str, str], values: Mapping[str, Any]) -> bool:
    return all(
        point[axis] in [_wanted(axis, one, values) for one in (wanted if isinstance(wanted, list) else [wanted])]
        for axis, wanted in constraint.items()
    )


def _cell(
    study: Study,
    shared: Mapping[str, Any],
    values: Mapping[str, Mapping[str, Any]],
    labels: dict[str, str],
    seed: int,
    folder: Path,
) -> Cell:
    tree = copy.deepcopy(dict(shared))
    for axis, label in labels.items():
        tree = _with_settings(tree, values[axis][label], f"axes.{axis}.{label}", study, folder)
    arm = "+".join(labels[axis] for axis in study.arm_axes) or "all"
    size = labels[study.size] if study.size else ""
    name = "-".join(filter(None, (arm, size, f"s{seed}")))
    if len(name) > 200:
        raise ConfigError(f"cell {name[:60]}... has a name of {len(name)} characters, at most 200: use shorter names")
    own = {"run.seed": seed, "run.steps": study.budget.steps, "run.dir": str(study.folder)}
    for key, value in {**own, "run.name": f"{RUNS}/{name}"}.items():
        set_key(tree, key, value, f"cell {name}", {})
    return Cell(name, arm, labels, size, seed, _with_seed(tree, seed))


def _with_settings(
    tree: dict[str, Any], settings: Mapping[str, Any], place: str, study: Study, folder: Path
) -> dict[str, Any]:
    """Set keys in a tree, as overrides on a command line do."""
    base = study.base.parent if isinstance(study.base, Path) else folder
    resolve_code_paths(tree, base)
    for key, value in settings.items():
        if key in _OWN or (key == "run" and isinstance(value, dict)):
            raise ConfigError(f"{place}: the study itself sets {', '.join(_OWN)}; set other keys as run.key: value")
        if "." not in key and not isinstance(value, dict):
            raise ConfigError(f"{place}: '{shorten(key)}' must read section.key, or name a section with all its keys")
        set_key(tree, key, copy.deepcopy(value), f"{place}: {shorten(key)}", {})
    resolve_code_paths(tree, folder)
    return tree


def _with_seed(value: Any, seed: int) -> Any:
    """Return a tree in whose texts {seed} is replaced."""
    if isinstance(value, dict):
        return {key: _with_seed(one, seed) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_seed(one, seed) for one in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value

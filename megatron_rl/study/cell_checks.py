"""Checks of a whole grid before its first run: every cell can run, no two are the same, and they are paired."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel

from megatron_rl.config import Config, make_config
from megatron_rl.config.code_paths import code_digests
from megatron_rl.errors import ConfigError, MegatronRLError, did_you_mean
from megatron_rl.study.grid import Cell, arms_of
from megatron_rl.study.study_file import Study
from megatron_rl.trainer.run_folder import KEYS_OF_AN_ATTEMPT, check_folder_paths

_EDGE = 1 << 20  # bytes at the start and the end of a file that its fingerprint covers
_SHARED = ("task", "eval")  # sections that paired cells have in common


@dataclass(frozen=True)
class ResolvedCell:
    """A cell whose configuration is valid.

    Attributes:
        cell: the cell.
        config: its configuration, with absolute paths.
        digest: digest of what it computes: the keys that differ from their defaults, model, data and the user's own
            code. A key that a release adds does not change it, while it has its default.
        former_digest: the same of all keys, as releases up to November 2026 recorded it.
    """

    cell: Cell
    config: Config
    digest: str
    former_digest: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run.folder


def resolve_cells(cells: Sequence[Cell], study: Study, check: Callable[[Config], Any]) -> list[ResolvedCell]:
    """Return all cells with their configurations, and absolute paths in their trees.

    Args:
        cells: the cells.
        study: their study.
        check: raises if a configuration cannot run; it is called once for cells that differ by their seed alone.

    Raises:
        ConfigError: some cells cannot run; all of them are named. Or cells are equal, or not paired, or the budget or
            the verdict does not fit them.
    """
    _check_study(study, cells)
    configs, refused = _configs(cells, check)
    if refused:
        names = "; ".join(f"{', '.join(ids)}: {reason}" for reason, ids in refused.items())
        count = sum(len(ids) for ids in refused.values())
        raise ConfigError(f"{count} of {len(cells)} cells cannot run, so none is started: {names}")
    prints: dict[str, str] = {}
    found = [
        ResolvedCell(cell, config, _digest(config, prints), _digest(config, prints, with_defaults=True))
        for cell, config in zip(cells, configs, strict=True)
    ]
    _check_differ(found)
    if study.paired:
        _check_paired(study, found)
    _check_evaluation(study, found)
    return found


def _configs(cells: Sequence[Cell], check: Callable[[Config], Any]) -> tuple[list[Config], dict[str, list[str]]]:
    """Return the configurations of the cells, and by the reason the ids of those that cannot run."""
    refused: dict[str, list[str]] = {}
    checked: dict[str, str | None] = {}
    configs = []
    for cell in cells:
        try:
            config = make_config(cell.tree)
            check_folder_paths(config.run.folder)
        except MegatronRLError as error:
            refused.setdefault(str(error), []).append(cell.id)
            continue
        make_absolute(cell.tree, config)
        config = make_config(cell.tree)
        configs.append(config)
        key = _without(config, run={"seed", "name"})
        if key not in checked:
            try:
                check(config)
                checked[key] = None
            except MegatronRLError as error:
                checked[key] = str(error)
        reason = checked[key]
        if reason is not None:
            refused.setdefault(reason, []).append(cell.id)
    return configs, refused


def make_absolute(tree: dict[str, Any], block: BaseModel) -> None:
    """Replace every relative path that a tree sets by an absolute one, in place. `block` is what the tree became."""
    for key, value in tree.items():
        made = getattr(block, key, None)
        if isinstance(made, Path):
            tree[key] = str(made.absolute())
        elif isinstance(made, BaseModel) and isinstance(value, dict):
            make_absolute(value, made)


def _without(config: Config, *, with_defaults: bool = True, **keys: set[str]) -> str:
    """Return a configuration as text without some keys of some sections."""
    tree = config.model_dump(mode="json", exclude_defaults=not with_defaults)
    kept = {name: {k: v for k, v in block.items() if k not in keys.get(name, ())} for name, block in tree.items()}
    return json.dumps({name: block for name, block in kept.items() if block or with_defaults}, sort_keys=True)


def _digest(config: Config, prints: dict[str, str], *, with_defaults: bool = False) -> str:
    """Return the digest of what a run computes. `prints` remembers fingerprints of files."""
    where = {section: set(keys) for section, keys in KEYS_OF_AN_ATTEMPT.items()}
    where["run"] = where["run"] - {"steps"}
    where |= {"model": {"path", "reference"}, "task": {"data", "eval_data"}}
    files = [config.model.path, *filter(None, (config.model.reference, config.task.data, config.task.eval_data))]
    for path in files:
        if str(path) not in prints:
            prints[str(path)] = fingerprint(path)
    parts = [
        _without(config, with_defaults=with_defaults, **where),
        *(prints[str(path)] for path in files),
        json.dumps(code_digests(config)),
    ]
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def fingerprint(path: Path) -> str:
    """Return a digest of a file or of the files of a folder: names, sizes, the first and the last MiB of each."""
    digest = xxhash.xxh3_128()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
            with file.open("rb") as content:
                digest.update(content.read(_EDGE))
                content.seek(max(0, size - _EDGE))
                digest.update(content.read(_EDGE))
    return digest.hexdigest()


def _check_study(study: Study, cells: Sequence[Cell]) -> None:
    arms = arms_of(list(cells))
    reference = study.verdict.reference
    if reference is not None and reference not in arms:
        raise ConfigError(f"verdict.reference: there is no arm '{reference}'; {did_you_mean(reference, arms)}")
    if study.verdict.margin is not None and reference is None:
        raise ConfigError("verdict.margin: equal to which arm? set verdict.reference")


def _check_differ(found: Sequence[ResolvedCell]) -> None:
    first: dict[str, str] = {}
    for one in found:
        twin = first.setdefault(one.digest, one.cell.id)
        if twin != one.cell.id:
            raise ConfigError(
                f"cells {twin} and {one.cell.id} have the same configuration, so an axis between them has no effect: "
                "mend its settings, or leave one of them out"
            )


def _check_paired(study: Study, found: Sequence[ResolvedCell]) -> None:
    """Check that the cells of one seed, and one size, share what makes prompt i of one prompt i of the other."""
    groups: dict[tuple[str, int], ResolvedCell] = {}
    for one in found:
        first = groups.setdefault((one.cell.size, one.cell.seed), one)
        for name, ours, theirs in _shared_values(one, first):
            if ours != theirs:
                raise ConfigError(
                    f"cells {first.cell.id} and {one.cell.id} are not paired: {name} is {theirs} and {ours}. Give "
                    "cells of one seed the same, name the axis of model sizes in `size`, or set paired: false"
                )


def _shared_values(one: ResolvedCell, other: ResolvedCell) -> list[tuple[str, Any, Any]]:
    dumps: list[Mapping[str, Any]] = [cell.config.model_dump(mode="json") for cell in (one, other)]
    pairs = [
        (f"{section}.{key}", value, dumps[1][section].get(key))
        for section in _SHARED
        for key, value in dumps[0][section].items()
    ]
    return [*pairs, ("model.path", str(one.config.model.path), str(other.config.model.path))]


def _check_evaluation(study: Study, found: Sequence[ResolvedCell]) -> None:
    """Check that every cell has evaluations to compare, also where its budget ends."""
    cut = study.budget.tokens is not None or study.budget.seconds is not None
    for one in found:
        if one.config.eval.prompts == 0:
            raise ConfigError(f"cell {one.cell.id}: eval.prompts is 0, so there is nothing to compare: set it")
        if cut and one.config.eval.every == 0:
            raise ConfigError(
                f"cell {one.cell.id}: eval.every is 0, and a budget of tokens or seconds may end a cell before "
                "budget.steps: set eval.every, so that there is an evaluation by then"
            )

"""A small study on a model folder, resolved without looking at the model's weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config import Config
from megatron_rl.study.cell_checks import ResolvedCell, resolve_cells
from megatron_rl.study.grid import make_cells
from megatron_rl.study.study_file import Study, load_study
from megatron_rl.study.study_folder import StudyFolder, make_record

AXES = {"arm": {"grpo": {"objective.name": "grpo"}, "drpo": {"objective.name": "drpo"}}}


def write_study(place: Path, **keys: Any) -> Path:
    """Write a study file, and a folder that stands for the model, and return the file."""
    model = place / "model"
    model.mkdir(exist_ok=True)
    if not (model / "model.safetensors").exists():
        (model / "model.safetensors").write_bytes(b"weights")
    base = {"model": {"path": str(model)}, "eval": {"prompts": 2, "every": 1, "samples": 4}}
    tree = {"base": base, "folder": str(place / "out"), "axes": AXES, "seeds": [0, 1], "budget": {"steps": 3}, **keys}
    file = place / "mine.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


def resolved(
    place: Path, check: Callable[[Config], Any] = lambda _: None, **keys: Any
) -> tuple[Study, list[ResolvedCell]]:
    """Return a study and its resolved cells. `check` stands for the preflight on this machine."""
    study, base = load_study(write_study(place, **keys))
    return study, resolve_cells(make_cells(study, base, place), study, check)


def written(place: Path, *, extend: bool = False, **keys: Any) -> StudyFolder:
    """Write the folder of a study as `study run` does, and return it."""
    study, cells = resolved(place, **keys)
    folder = StudyFolder(place / "out")
    folder.make()
    folder.write(make_record(study, cells), cells, place / "mine.yaml", extend=extend)
    return folder

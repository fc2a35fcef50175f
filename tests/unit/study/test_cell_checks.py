"""A grid with a contradiction is refused whole, with every cell that cannot run."""

from pathlib import Path

import pytest

from megatron_rl.config import Config
from megatron_rl.config.schema import OptimizerConfig
from megatron_rl.errors import ConfigError, PrecisionError
from megatron_rl.objectives import make_objective
from megatron_rl.study import cell_checks
from megatron_rl.study.cell_checks import resolve_cells
from megatron_rl.study.grid import make_cells
from megatron_rl.study.study_file import load_study
from tests.unit.study.studies import AXES, resolved

STUDIES = sorted((Path(__file__).parents[3] / "configs").glob("study_*.yaml"))


def test_every_bad_cell_is_named_with_its_reason(tmp_path):
    axes = {**AXES, "optimizer.updates_per_step": [4, 64]}

    def check(config):
        if config.objective.name == "drpo":
            raise PrecisionError("no such format here")

    with pytest.raises(ConfigError) as refused:
        resolved(tmp_path, check, axes=axes)
    text = str(refused.value)
    assert text.startswith("6 of 8 cells cannot run, so none is started: ")
    too_many = [f"{arm}+updates_per_step=64-s{seed}" for arm in ("grpo", "drpo") for seed in (0, 1)]
    assert f"{', '.join(too_many)}: optimizer.updates_per_step exceeds" in text
    assert "drpo+updates_per_step=4-s0, drpo+updates_per_step=4-s1: no such format here" in text
    assert "grpo+updates_per_step=4" not in text and "\n" not in text


def test_cells_that_differ_by_their_seed_alone_are_checked_once(tmp_path):
    seen = []
    resolved(tmp_path, seen.append, seeds=list(range(5)))
    assert [config.objective.name for config in seen] == ["grpo", "drpo"]


def test_paths_become_absolute_so_that_a_cell_runs_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, cells = resolved(tmp_path, settings={"model.path": "model"})
    assert {cell.cell.tree["model"]["path"] for cell in cells} == {str(tmp_path / "model")}
    assert all("precision" not in cell.cell.tree for cell in cells), "keys that nobody set stay unset"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"axes": {"arm": {"a": {}, "b": {"run.keep": 7}}}}, "cells a-s0 and b-s0 have the same configuration"),
        ({"axes": {"arm": {"a": {}, "b": {"eval.samples": 5}}}}, "b-s0 are not paired: eval.samples is 4 and 5"),
        ({"axes": {"arm": {"a": {}, "b": {"model.path": "other"}}}}, "are not paired: model.path is"),
        ({"settings": {"eval.prompts": 0}}, "eval.prompts is 0, so there is nothing to compare"),
        ({"settings": {"eval.every": 0}, "budget": {"steps": 3, "tokens": 10}}, "eval.every is 0, and a budget"),
        ({"verdict": {"reference": "gro"}}, "there is no arm 'gro'; did you mean 'grpo'"),
        ({"verdict": {"margin": 0.02}}, "verdict.margin: equal to which arm"),
    ],
)  # fmt: skip
def test_a_comparison_that_means_nothing_is_refused(tmp_path, monkeypatch, keys, words):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"others")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        resolved(tmp_path, **keys)


def test_what_is_said_to_be_unpaired_or_a_size_may_differ(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"others")
    axes = {"size": {"small": {}, "large": {"model.path": str(tmp_path / "other")}}}
    assert len(resolved(tmp_path, axes=axes, size="size")[1]) == 4
    assert len(resolved(tmp_path, axes=axes, paired=False)[1]) == 4


def test_a_key_that_a_release_adds_keeps_the_digest_while_it_has_its_default(tmp_path, monkeypatch):
    class LaterOptimizer(OptimizerConfig):
        added: int = 7

    class LaterConfig(Config):
        optimizer: LaterOptimizer = LaterOptimizer()

    before = [cell.digest for cell in resolved(tmp_path, settings={"optimizer.lr": 0.5})[1]]
    monkeypatch.setattr(cell_checks, "make_config", LaterConfig.model_validate)
    later = {
        added: [cell.digest for cell in resolved(tmp_path, settings={"optimizer.lr": 0.5, "optimizer.added": added})[1]]
        for added in (7, 8)
    }
    assert later[7] == before and set(later[8]).isdisjoint(before)


def test_a_digest_is_of_what_a_cell_computes_not_of_where(tmp_path):
    def digests(**keys):
        return [cell.digest for cell in resolved(tmp_path, **keys)[1]]

    first = digests()
    assert len(set(first)) == 4
    assert digests(folder=str(tmp_path / "elsewhere"), settings={"run.keep": 9, "rollout.servers": 2}) == first
    assert set(digests(settings={"optimizer.lr": 0.5})).isdisjoint(first)
    assert set(digests(budget={"steps": 4})).isdisjoint(first)
    (tmp_path / "teacher").mkdir()
    taught = []
    for weights in (b"old", b"new"):
        (tmp_path / "teacher" / "model.safetensors").write_bytes(weights)
        taught += digests(settings={"model.reference": str(tmp_path / "teacher")})
    assert len({*first, *taught}) == 12, "a reference of other weights is another study"
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weightz")
    assert set(digests()).isdisjoint(first), "another warm start under the same name is another study"


@pytest.mark.parametrize("file", [file for file in STUDIES if file.stem != "study_warmup"], ids=lambda file: file.stem)
def test_the_studies_of_the_repository_are_whole(file):
    study, base = load_study(file)
    cells = resolve_cells(
        make_cells(study, base, file.parent), study, lambda config: make_objective(config.objective.spec())
    )
    assert len(cells) == len(study.seeds) * len({one.cell.arm for one in cells})
    assert study.verdict.reference in {one.cell.arm for one in cells}

"""The reference pages are those of the code, and every key of the configuration and of the log is described."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_rl.config import Config, load_config, make_config
from megatron_rl.config.describe import KeyDoc, default_tree, key_docs
from megatron_rl.diagnostics.log_keys import SECTIONS, is_declared
from megatron_rl.plan.erpd_plan import ERPDPlan, SignalPlan
from megatron_rl.reference import FOLDER, config_page, config_yaml, metrics_page, write_reference
from tests.unit.objectives.specs import Spec, batch, every_objective, only_needed

MOST_KEYS = 85


def schema_keys() -> Iterator[KeyDoc]:
    yield from (*key_docs(), *key_docs(ERPDPlan), *key_docs(SignalPlan))


@pytest.mark.parametrize(("name", "page"), [("config.md", config_page), ("metrics.md", metrics_page)])
def test_the_pages_are_up_to_date(name, page):
    assert (FOLDER / name).read_text(encoding="utf-8") == page(), "run: make reference"
    assert all(len(line) <= 120 for line in page().splitlines())


def test_both_pages_are_written(tmp_path):
    write_reference(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.md", "metrics.md"}


def test_every_key_has_a_description():
    assert not [key.name for key in schema_keys() if not key.description]


def test_the_number_of_keys_is_bounded():
    own = [key.name for key in key_docs() if key.path[0] not in ("objective", "task")]
    assert len(own) <= MOST_KEYS, "merge or remove keys before you add one"


def test_types_and_defaults_are_in_words():
    docs = {key.name: key for key in key_docs()}
    assert docs["model.path"].default == "required"
    assert (docs["rollout.sglang.mem_fraction"].kind, docs["rollout.sglang.mem_fraction"].default) == (
        "number, above 0, below 1",
        0.8,
    )
    assert docs["alp.layers"].kind == "`all` or `logits` or list of 2 integers"
    assert docs["run.loggers"].kind == "list of text" and docs["run.loggers"].default == ["tensorboard"]
    assert docs["alp.level"].kind.endswith("or null") and docs["run.dir"].default == "runs"


@pytest.mark.parametrize(
    ("objective", "comment"),
    [
        ({"name": "grpo", "clip_low": 0.1}, "  # the ratio is bounded below by 1 - clip_low\n  clip_low: 0.1\n"),
        ({"name": "erpd", "teacher": {"name": "erpd_mse"}}, "  # objective of stage 1: name and keys\n  teacher:\n"),
        ({"name": "mine:Mine", "own": 3}, "  own: 3\n"),
    ],
)
def test_a_printed_configuration_loads_as_itself_and_describes_its_keys(tmp_path, objective, comment):
    sections = {"rollout": {"urls": ["http://a:1"]}, "run": {"name": "# no \N{SNOWMAN} comment: 'x'"}}
    config = make_config({"model": {"path": "m"}, "objective": objective, **sections})
    text = config_yaml(config)
    path = tmp_path / "printed.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == config
    assert comment in text and "  # seed of prompts, sampling and noise\n  seed: 0\n" in text
    assert "\n# The run: its folder, length, seed, checkpoints and device.\nrun:\n" in text


def test_the_defaults_are_printed_with_every_key():
    text = config_yaml(None)
    tree = default_tree()
    assert tree["model"].pop("path") == "required" and "  # path:  (required)" in text
    assert yaml.safe_load(text) == tree
    tree["model"]["path"] = "m"
    assert make_config(tree) == Config(model={"path": "m"})


def test_every_log_key_names_the_function_that_computes_it():
    for key in (key for section in SECTIONS for key in section.keys):
        parts = key.place.split(".")
        for cut in range(len(parts), 0, -1):
            path = Path(*parts[:cut])
            if (FOLDER.parents[1] / "megatron_rl" / path).with_suffix(".py").is_file():
                break
        found = importlib.import_module(f"megatron_rl.{'.'.join(parts[:cut])}")
        for name in parts[cut:]:
            found = getattr(found, name, None)
            assert found is not None, key.place


def test_no_log_key_is_declared_twice_and_an_unknown_one_is_not_declared():
    names = [prefix + key.name for section in SECTIONS for key in section.keys for prefix in ("", *key.prefixes)]
    assert len(names) == len(set(names))
    for known in ("mismatch/stale_3/k3", "erpd/teacher/clip/high", "seconds/sync", "alp/clean/envelope/p98/9"):
        assert is_declared(known)
    for unknown in ("mismatch/stale_x/k3", "losss", "seconds/coffee", "mismatch/", "reward/mean/x", "foo/weight"):
        assert not is_declared(unknown)


@every_objective
def test_the_metrics_of_every_objective_are_declared(spec: Spec):
    objective = spec.make(kl_coef=0.1)
    metrics = objective(only_needed(objective, batch(0, [3, 2, 4]))).metrics
    values = {name: float(value) for name, value in metrics.items()}
    found = values | objective.summary(values)
    assert found and not {name for name in found if not is_declared(name)}

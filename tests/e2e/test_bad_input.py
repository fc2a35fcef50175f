"""A run that cannot work is refused in one paragraph with exit code 2, before anything is started or written."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.command import assert_refused, records

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def own_model(arithmetic_model, tmp_path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(arithmetic_model, tmp_path / "model"))


def rewrite(model: Path, change) -> None:
    """Apply `change` to the tensors in the model's weight file."""
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def test_an_unknown_key(cli, small_run, run_folder):
    with small_run.open("a") as file:
        file.write("evaluation: {prompts: 4}\n")
    result = cli("train", small_run)
    assert_refused(result, "ConfigError", f"{small_run}:8: unknown key 'evaluation'; did you mean 'eval'?")
    assert not run_folder.exists()


def test_an_unknown_key_of_the_objective(refused, small_run, run_folder):
    assert_refused(refused("train", small_run, "objective.detla=0.1"), "ConfigError", "detla", "delta")
    assert not run_folder.exists()


def test_a_truncated_weight_file(refused, small_run, run_folder, own_model):
    size = (own_model / WEIGHTS).stat().st_size
    os.truncate(own_model / WEIGHTS, size - 4)
    result = refused("train", small_run, f"model.path={own_model}")
    assert_refused(result, "CheckpointError", own_model / WEIGHTS, "truncated", size, size - 4)
    assert not run_folder.exists()


def test_a_tensor_of_the_wrong_shape(refused, small_run, run_folder, own_model):
    rewrite(own_model, lambda tensors: tensors.update({DOWN: torch.zeros(64, 95)}))
    result = refused("train", small_run, f"model.path={own_model}")
    assert_refused(result, "CheckpointError", DOWN, own_model / WEIGHTS, "[64, 95]", "[64, 96]")
    assert not run_folder.exists()


def test_a_tensor_the_model_does_not_know(refused, small_run, run_folder, own_model):
    rewrite(own_model, lambda tensors: tensors.update({"model.layers.1.mlp.extra.weight": torch.zeros(2)}))
    result = refused("train", small_run, f"model.path={own_model}")
    assert_refused(result, "CheckpointError", "model.layers.1.mlp.extra.weight", own_model / WEIGHTS)
    assert not run_folder.exists()


def test_heads_that_do_not_divide_over_tensor_parallel_ranks(refused, small_run, run_folder):
    budget = "optimizer.tokens_per_microbatch=258"
    result = refused("train", small_run, "parallel.tensor=3", budget)
    assert_refused(result, "ConfigError", "num_attention_heads", "4", "parallel.tensor", "3")
    assert not run_folder.exists()


def test_layers_that_do_not_divide_over_pipeline_stages(refused, small_run, run_folder):
    result = refused("train", small_run, "parallel.pipeline=3")
    assert_refused(result, "ConfigError", "parallel.pipeline", "3", "does not divide 2 layers")
    assert not run_folder.exists()


def test_a_malformed_line_of_data(refused, small_run, run_folder, tmp_path):
    data = tmp_path / "problems.jsonl"
    rows = [json.dumps({"question": f"1+{i}=", "answer": f"#### {i + 1}"}) for i in range(2)]
    data.write_text("\n".join([*rows, '{"question": "1+1=", "answer": ', *rows]), encoding="utf-8")
    result = refused("train", small_run, "task.name=math", f"task.data={data}", "task.held_out=1")
    assert_refused(result, "UserError", f"{data}:3: not a JSON object")
    assert not run_folder.exists()


def test_a_run_folder_that_holds_a_run_already(refused, small_run, run_folder):
    run_folder.mkdir(parents=True)
    log = '{"kind": "step", "step": 0}\n'
    (run_folder / "log.jsonl").write_text(log)
    result = refused("train", small_run)
    assert_refused(result, "ConfigError", run_folder.relative_to(small_run.parent), "--resume")
    assert (run_folder / "log.jsonl").read_text() == log
    assert [path.name for path in run_folder.iterdir()] == ["log.jsonl"]


def test_weights_that_are_not_finite(cli, small_run, run_folder, own_model):
    def poison(tensors):
        tensors[DOWN][3, 4] = float("nan")

    rewrite(own_model, poison)
    result = cli("train", small_run, f"model.path={own_model}")
    assert result.code == 2, result.all
    assert "Traceback" not in result.err and f"tensor {DOWN} of {own_model} has values that are NaN" in result.err
    assert records(run_folder) == []


def test_weights_whose_log_probabilities_overflow(cli, small_run, run_folder, own_model):
    """Every weight and every digest is finite, but the log-probabilities of engine and trainer are not."""

    def inflate(tensors):
        head = tensors["lm_head.weight"]
        head.div_(head.abs().max()).mul_(3e38)

    rewrite(own_model, inflate)
    result = cli("train", small_run, f"model.path={own_model}")
    assert result.code == 75, result.all  # the engine failed
    assert "Traceback" not in result.err
    found = re.search(r"16 trajectories \((\d+), (\d+), ", result.err)
    assert found is not None, result.all
    first, second = map(int, found.groups())
    assert first % 16 == 0 and second == first + 1, "the trajectories of one whole group"
    assert records(run_folder) == []

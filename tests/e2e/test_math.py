"""The shipped configuration trains on word problems in GSM8K's format, pipeline parallel and tensor parallel."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.policy.checkpoint_state import newest_valid
from tests.e2e.command import ROOT, records
from tests.e2e.models import make_math_model

PROMPTS, SAMPLES, STEPS = 4, 2, 2


def problems() -> Path:
    """Return GSM8K's training file if there is one, else a few rows in its format.

    The file is named by MEGATRON_RL_GSM8K or lies next to the repository.
    """
    named = os.environ.get("MEGATRON_RL_GSM8K")
    beside = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    excerpt = ROOT / "tests" / "data" / "math_excerpt.jsonl"
    return Path(named) if named else beside if beside.is_file() else excerpt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model whose vocabulary is trained on the questions."""
    rows = problems().read_text(encoding="utf-8").splitlines()[:300]
    return make_math_model(tmp_path_factory.mktemp("math") / "hf", [json.loads(row)["question"] for row in rows])


@pytest.fixture
def train_math(cli, model, tmp_path):
    """A function that trains with configs/math.yaml and overrides, and returns the run folder."""

    def train_math(*overrides):
        common = [
            f"model.path={model}",
            f"task.data={problems()}",
            "task.eval_data=null",
            "task.held_out=4",
            "eval.prompts=4",
            "eval.samples=2",
            f"rollout.prompts_per_step={PROMPTS}",
            f"rollout.samples_per_prompt={SAMPLES}",
            "rollout.max_prompt_tokens=1024",
            "rollout.max_new_tokens=24",
            "optimizer.updates_per_step=2",
            "optimizer.tokens_per_microbatch=2048",
            f"run.dir={tmp_path}",
            f"run.steps={STEPS}",
        ]
        result = cli("train", ROOT / "configs" / "math.yaml", *common, *overrides)
        assert result.code == 0, result.all
        return tmp_path / "math"

    return train_math


def assert_whole(run: Path, model: Path) -> None:
    """Check that all trajectories and both evaluations exist, and that checkpoint and exported model are complete."""
    steps = records(run)
    assert [(r["step"], r["version"]) for r in steps] == [(0, 1), (1, 2)]
    for record in steps:
        assert round(record["tokens/response"] / record["response_length/mean"]) == PROMPTS * SAMPLES
        assert record["tokens/total"] > record["tokens/response"] + 8 * PROMPTS * SAMPLES, "prompts are whole questions"
        assert record["entropy"] > 1.0
    assert [r["step"] for r in records(run, "eval")] == [0, STEPS]
    assert newest_valid(run / "checkpoints") == (run / "checkpoints" / f"step_{STEPS:06d}", [])
    given, exported = (load_file(folder / "model.safetensors") for folder in (model, run / "hf"))
    assert {n: t.shape for n, t in exported.items()} == {n: t.shape for n, t in given.items()}
    assert all(torch.isfinite(tensor).all() for tensor in exported.values())


def test_a_pipeline_parallel_run_agrees_with_its_engine(train_math, model):
    run = train_math("parallel.tensor=1", "parallel.pipeline=2", "precision.train=fp32", "precision.rollout=fp32")
    assert_whole(run, model)
    for record in records(run):  # equal weights in float32: the ratios differ from 1 only by rounding
        assert record["mismatch/kl/k3"] < 1e-9
        assert abs(record["mismatch/ratio/max"] - 1) < 1e-3 and abs(record["mismatch/ratio/min"] - 1) < 1e-3


def test_a_tensor_parallel_run_in_bfloat16_stays_near_its_engine(train_math, model):
    run = train_math("parallel.sequence=true")
    assert_whole(run, model)
    for record in records(run):
        assert 1e-9 < record["mismatch/kl/k3"] < 1e-2
        assert 0.5 < record["mismatch/ratio/min"] < 1 < record["mismatch/ratio/max"] < 2

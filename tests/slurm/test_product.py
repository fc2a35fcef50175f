"""A real run on the virtual cluster: TP2 over two nodes, two engines on two others. What it loses, it repeats."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.launch.conductor.slurm_commands import steps_of_job
from megatron_rl.launch.submit import Request, submit_job
from tests.e2e.command import records
from tests.e2e.models import make_arithmetic_model
from tests.slurm.conftest import ROOT
from tests.slurm.virtual_cluster import FakeRun, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
STEPS = 12
CONFIG = """
model: {{path: {model}}}
parallel: {{tensor: 2}}
rollout: {{servers: 2, prompts_per_step: 8, samples_per_prompt: 4, max_prompt_tokens: 8, max_new_tokens: 4,
           deterministic: true}}
objective: {{name: drpo, delta: 0.15, advantage: grpo, norm: token_mean}}
optimizer: {{lr: 1.0e-3, updates_per_step: 2, tokens_per_microbatch: 512}}
task: {{name: arithmetic, max_operand: 2, held_out: 2}}
run: {{dir: {folder}, name: {name}, steps: {steps}, save_every: 2, device: cpu}}
"""
TIMES = ("seconds/", "tokens_per_s")


def numbers(run: Path) -> dict[int, dict[str, Any]]:
    """Return everything but times that the log says of each step."""
    return {one["step"]: {k: v for k, v in one.items() if not k.startswith(TIMES)} for one in records(run)}


def write_config(folder: Path, name: str, model: Path) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(model=model, folder=folder, name=name, steps=STEPS))
    return path


def until_record(run: FakeRun, step: int) -> None:
    """Wait until a run has logged a step."""
    wait_for(lambda: any(one["step"] == step for one in records(run.run)), f"step {step}", 400)


def test_a_run_that_loses_an_engine_and_nodes_equals_one_that_does_not(cluster, tmp_path):
    """It goes on without the engine, is stopped, and loses a trainer's node together with an engine's."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    model = make_arithmetic_model(tmp_path / "model")
    command = [sys.executable, "-m", "megatron_rl", "launch", "local", str(write_config(tmp_path, "alone", model))]
    alone = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        run = FakeRun.real(cluster, tmp_path, "whole")
        settings = ["signal_margin_s=60", "start_timeout_s=400", "requeue.max_without_progress=3"]
        settings += ["on_engine_loss=continue"]
        submit_job(Request(write_config(tmp_path, "whole", model), [], "virtual", settings))
        until_record(run, 0)
        cluster.ask("scancel", "--signal=KILL", steps_of_job(run.job)["engine-1"])
        until_record(run, 3)
        cluster.ask("scancel", "--batch", "--signal=USR1", run.job)
        run.until_attempt(2, 200)
        until_record(run, 7)
        cluster.node("kill", "node2", "node4")  # of the trainer, and of an engine
        wait_for(lambda: cluster.ask("squeue", "-h", "-j", run.job, "-o", "%T") != "RUNNING", "a requeue", 200)
        cluster.node("start", "node2", "node4")
        assert run.result(400)["code"] == 0, run.log()
        assert alone.wait(400) == 0
    finally:
        alone.kill()
        cluster.node("start", "node2", "node4")
        cluster.until_idle()
    assert "engine-1 is lost (on node4): training goes on with 1 of 2 engines; it is started again" in run.log()
    first = (run.run / "logs" / "attempt-1" / "trainer-node1-0.log").read_text()
    assert " is lost: " in first, first
    assert len(run.attempts()) == 3 and run.attempts()[0]["why"].startswith("stopped and saved (deadline)")
    ours, theirs = numbers(run.run), numbers(tmp_path / "alone")
    assert list(ours) == list(range(STEPS)) and any(step["reward/mean"] for step in ours.values())
    assert ours == theirs
    name = "hf/model.safetensors"
    assert (run.run / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()

"""Quickstart on a laptop: build a small model, warm it up, train it by reinforcement learning, write a report."""

import os
import shutil
import time
from pathlib import Path

import torch

from megatron_rl.config import load_config
from megatron_rl.diagnostics.runlog import read_log
from megatron_rl.errors import ExitCode, UserError
from megatron_rl.launch.ranks import run_ranks
from megatron_rl.report import write_report
from megatron_rl.tiny_model import make_tiny_model

WARM_PASS_RATE = 0.35
ERROR_RATE = 0.4  # share of wrong demonstrations: they show the form of a solution, the reward what is right


def run_quickstart(folder: Path, config_dir: Path) -> None:
    """Build, warm up and train a small model, and write the report of its run.

    Models are written to FOLDER/quickstart-models, the run to FOLDER/quickstart. Both are deleted first.
    Raises UserError if a stage fails; the ranks of the stage print the cause before.
    """
    started = time.monotonic()
    warmup_file, train_file = config_dir / "warmup.yaml", config_dir / "quickstart.yaml"
    models = folder / "quickstart-models"
    fresh, warm = models / "fresh", models / "warm"
    place = [f"run.dir={folder}"]
    target = load_config(train_file, [f"model.path={warm}", *place]).run.folder
    for old in (models, target):
        shutil.rmtree(old, ignore_errors=True)

    ranks = load_config(train_file, [f"model.path={warm}", *place]).parallel.world_size
    if hides_gpus(torch.cuda.device_count(), ranks):  # the count comes from the driver and initializes no CUDA
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        _say(f"this machine has fewer than {ranks} GPUs, one for each rank: everything runs on its CPUs")
    _say("1/4 building a small Qwen3 model and its tokenizer")
    warmup = load_config(warmup_file, [f"model.path={fresh}", *place])
    numbers = range(warmup.task.max_operand)
    make_tiny_model(fresh, [f"{a}+{b}={a + b}" for a in numbers for b in numbers], seed=warmup.run.seed)

    _say(
        f"2/4 supervised warm-up to a pass rate of {WARM_PASS_RATE:.0%}; "
        f"the teacher is wrong {ERROR_RATE:.0%} of the time"
    )
    options = ["--dest", str(warm), "--target", str(WARM_PASS_RATE), "--error-rate", str(ERROR_RATE)]
    options += ["--batch-size", "224", "--max-updates", "2000"]
    _ranks(["warmup", str(warmup_file), f"model.path={fresh}", *place, *options], warmup.parallel.world_size)

    _say("3/4 reinforcement learning, rollouts from a server of its own")
    _ranks(["train", str(train_file), f"model.path={warm}", *place], ranks)

    _say("4/4 report")
    page = write_report(target)
    before, after = (r for r in read_log(target) if r.get("kind") == "eval")
    _say(
        f"held-out pass rate: sampled {before['eval/sampled']:.1%} -> {after['eval/sampled']:.1%}, "
        f"greedy {before['eval/greedy']:.1%} -> {after['eval/greedy']:.1%}, in {time.monotonic() - started:.0f} s\n"
        f"the improved model: {target / 'hf'}\nplots: {page}"
    )


def hides_gpus(gpus: int, ranks: int) -> bool:
    """Return whether the quickstart hides the GPUs: there are some, and too few for its ranks."""
    return 0 < gpus < ranks


def _ranks(arguments: list[str], count: int) -> None:
    code = run_ranks(arguments, count)
    if code == ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"`megatron-rl {arguments[0]}` ended with code {code}; its message is above")


def _say(text: str) -> None:
    print(text, flush=True)

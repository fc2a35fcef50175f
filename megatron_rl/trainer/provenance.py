"""provenance.jsonl of a run folder: what computed the run, one line for each start of it."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import megatron_rl
from megatron_rl.config import Config
from megatron_rl.engines.processes.engine_packages import read_packages
from megatron_rl.files import append_file
from megatron_rl.plan import RunPlan
from megatron_rl.weights.hf_folder import HFFolder

CHECKOUT = Path(megatron_rl.__file__).resolve().parent.parent
PROVENANCE_NAME = "provenance.jsonl"
_PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "safetensors", "transformer-engine")
_GIT_S = 60.0


def write_provenance(config: Config, plan: RunPlan, step: int) -> None:
    """Append the record of a start of the run. For rank 0, once the run folder exists.

    Args:
        config: the resolved configuration.
        plan: the resolved plan.
        step: number of steps that are done by then.
    """
    record = {"step": step, "time": time.time(), **describe_origin(config, plan)}
    append_file(config.run.folder / PROVENANCE_NAME, json.dumps(record).encode() + b"\n")


def describe_origin(config: Config, plan: RunPlan) -> dict[str, Any]:
    """Return revision, versions, device, layout and plan of a run, as JSON data."""
    cuda = plan.machine.capability is not None
    own = {"megatron-rl": megatron_rl.__version__, "python": platform.python_version()}
    return {
        "revision": git_revision(),
        "versions": own | package_versions(config),
        "device": f"{torch.cuda.get_device_name()} ({plan.machine.name})" if cuda else "CPU",
        "host": platform.node(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": config.parallel.world_size + plan.placement.engine_gpus if cuda else 0,
        "parameters": sum(math.prod(info.shape) for info in HFFolder(config.model.path).tensors.values()),
        "layout": {**config.parallel.model_dump(), "ranks": config.parallel.world_size},
        "precision": {
            "train": plan.precision.train,
            "recipe": plan.precision.recipe,
            "engine": plan.precision.engine,
            "wire": str(plan.precision.wire),
            "computed": plan.report.computed,
            "unified": None if plan.report.apart is None else not plan.report.apart,
        },
        "plan": plan.lines(config),
    }


def git_revision(checkout: Path = CHECKOUT) -> str:
    """Return the commit of the checkout that holds the package, with `dirty` if it has changes; or the version."""
    revision = git_output("rev-parse", "HEAD", checkout=checkout).strip()
    if not revision:
        return f"no checkout; version {megatron_rl.__version__}"
    changes = git_output("status", "--porcelain", "--untracked-files=no", checkout=checkout)
    return f"{revision} dirty" if changes else revision


def git_output(*arguments: str, checkout: Path = CHECKOUT) -> str:
    """Return the output of git in the checkout; empty if the package is no part of one."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def package_versions(config: Config) -> dict[str, str]:
    """Return the versions of the trainer's packages, and of SGLang in the environment of the run's own servers."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if config.rollout.engine == "sglang" and config.rollout.own_servers:
        found["sglang"] = read_packages(config.rollout.sglang.python).sglang or "not installed"
    return found

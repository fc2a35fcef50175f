"""Cold start of a run by phase, and the peak memory of its processes against the bytes of the model.

Both are runs of one trainer rank and one embedded engine, on a model with random weights.

Start: the seconds from the command to the end of the first step, by the times of the files that a run writes. The
engine starts beside the trainer's model.

Memory: the peak of each process's own memory, less the same of a run of a tiny model, divided by the bytes of the
model in the dtype that both compute in. The run also writes a checkpoint and the final model. Prints two tables, and
one JSON line for docs/benchmarks.md.

    python benchmarks/footprint.py [--hidden 768 --layers 12 --train fp32 bf16 --transport distributed]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from models import make_qwen3

from megatron_rl.tiny_model import make_tiny_model

VOCAB, STEPS = 4096, 3
NAMES = (("trainer", "mrl-rank"), ("engine", "mrl-serve"))
WIDTHS = {"fp32": 4, "bf16": 2}


def make_model(folder: Path, hidden: int, layers: int, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model with random weights whose tokenizer can spell sums."""
    torch.manual_seed(0)
    make_qwen3(folder, hidden=hidden, layers=layers, vocab=VOCAB, dtype=dtype)
    small = make_tiny_model(folder / "small", [f"{a}+{b}={a + b}" for a in range(9) for b in range(9)], seed=0)
    for path in small.glob("tokenizer*"):
        shutil.copy(path, folder)
    shutil.rmtree(small)
    return folder


def settings(model: Path, folder: Path, name: str, train: str, transport: str) -> list[str]:
    """Return the options of a run."""
    keys = {
        "model.path": model,
        "precision.train": train,
        "precision.rollout": train,
        "rollout.prompts_per_step": 4,
        "rollout.samples_per_prompt": 4,
        "rollout.max_prompt_tokens": 8,
        "rollout.max_new_tokens": 8,
        "rollout.transport": transport,
        "optimizer.tokens_per_microbatch": 512,
        "task": "{name: arithmetic, max_operand: 9, held_out: 2}",
        "run": f"{{name: {name}, dir: {folder}, steps: {STEPS}, save_every: 0, loggers: []}}",
    }
    return [f"{key}={value}" for key, value in keys.items()]


def command(options: list[str], folder: Path) -> list[str]:
    """Return the command of a run."""
    empty = folder / "empty.yaml"
    empty.write_text("")
    return [sys.executable, "-m", "megatron_rl", "train", str(empty), *options]


# Memory ----------------------------------------------------------------------------------------------------


def peaks(run: list[str]) -> dict[str, float]:
    """Run a command to its end. Return the largest resident memory of the trainer, the engine and all together."""
    process = psutil.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    found = {"trainer": 0.0, "engine": 0.0, "together": 0.0}
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            tree = [process, *process.children(recursive=True)]
            sizes = [(one.name(), one.memory_full_info().uss) for one in tree]
            now = {kind: float(max((s for n, s in sizes if n.startswith(start)), default=0)) for kind, start in NAMES}
            now["together"] = float(sum(size for _, size in sizes))
            found = {name: max(found[name], value) for name, value in now.items()}
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(run)} ended with code {process.returncode}")
    return found


def memory(args: argparse.Namespace, folder: Path, train: str) -> dict[str, Any]:
    """Return the peaks above those of a tiny model, in models."""
    sizes = {"large": (args.hidden, args.layers), "tiny": (64, 1)}
    found = {}
    for name, (hidden, layers) in sizes.items():
        dtype = torch.float32 if train == "fp32" else torch.bfloat16
        model = make_model(folder / f"{name}-{train}", hidden, layers, dtype)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        options = settings(model, folder, f"{name}-{train}-run", train, args.transport)
        found[name] = peaks(command(options, folder)) | {"model": size}
    extra = {key: found["large"][key] - found["tiny"][key] for key in found["large"]}
    return {
        "train": train,
        "model_mb": found["large"]["model"] / 2**20,
        **{key: extra[key] / extra["model"] for key in ("trainer", "engine", "together")},
        **{f"tiny_{key}_mb": found["tiny"][key] / 2**20 for key in ("trainer", "engine")},
    }


# Start -----------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run the command. Return the seconds of each phase until the first step is done, from the files of the run."""
    model, name = make_model(folder / "start", args.hidden, args.layers), "start-run"
    run = command(settings(model, folder, name, "fp32", args.transport), folder)
    began = time.time()
    process = psutil.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    log = folder / name / "log.jsonl"
    while not log.exists() or "\n" not in log.read_text():
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(run)} ended with code {process.returncode}")
        time.sleep(0.002)
    ended = time.time()
    process.wait()
    first = json.loads(log.read_text().splitlines()[0])
    taken, opened = ((folder / name / file).stat().st_mtime for file in ("config.yaml", "provenance.jsonl"))
    return {
        "imports, plan, process groups": taken - began,
        "model, optimizer, engine": opened - taken,
        "first publish": ended - first["seconds/total"] - opened,
        **{phase: first[f"seconds/{phase}"] for phase in ("rollout", "update", "sync")},
        "to the end of the first step": ended - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--train", nargs="+", default=["fp32", "bf16"], choices=list(WIDTHS))
    parser.add_argument("--transport", default="distributed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        phases = start(args, Path(place))
        rows = [memory(args, Path(place), train) for train in args.train]
    print(f"{'phase of a cold start':<32}{'seconds':>9}")
    for name, seconds in phases.items():
        print(f"{name:<32}{seconds:>9.2f}")
    print(
        f"\n{'peak, in models':<10}{'MB':>8}{'trainer':>9}{'engine':>8}{'together':>10}{'tiny: trainer, engine MB':>28}"
    )
    for row in rows:
        tiny = f"{row['tiny_trainer_mb']:.0f}, {row['tiny_engine_mb']:.0f}"
        print(
            f"{row['train']:<10}{row['model_mb']:>13.0f}{row['trainer']:>9.2f}{row['engine']:>8.2f}"
            f"{row['together']:>10.2f}{tiny:>28}"
        )
    print(json.dumps({"phases": phases, "memory": rows, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()

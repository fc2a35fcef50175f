"""A long run of small steps: memory, open files and threads of every process must not grow.

Trains a tiny model with random weights and the embedded engine, TP2 and a step of staleness, so that every kind of
thread and connection is in use. Every 10 steps each process is measured. The first half of the steps is warm-up: pools,
caches and the heap fill. After it, the growth of resident memory is the slope of a line through the measurements, in MB
per 100 steps; of files, threads and processes, the most of each half are compared. Exits with 1 if something grows.

    make soak      # or: python benchmarks/soak.py [--steps 600] [--json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from megatron_rl.tiny_model import make_tiny_model

EVERY = 10  # steps between measurements
LEAST = 80  # steps
MOST_MB = 2.0  # growth of one process in 100 steps that is no leak: fragments of the heap
LIMIT_S = 120.0  # until `EVERY` steps are done
MIB = 1 << 20


@dataclass
class Seen:
    """What was measured of one process, a number for each measurement."""

    name: str
    rss: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


def start(model: Path, folder: Path) -> psutil.Popen:
    """Start a run without an end."""
    (folder / "soak.yaml").write_text("")
    keys = {
        "model.path": model,
        "precision.train": "fp32",
        "parallel.tensor": 2,
        "rollout.prompts_per_step": 8,
        "rollout.samples_per_prompt": 4,
        "rollout.max_prompt_tokens": 8,
        "rollout.max_new_tokens": 6,
        "rollout.max_staleness": 1,
        "task": "{name: arithmetic, max_operand: 50, held_out: 16}",
        "eval": "{every: 20, prompts: 16}",
        "run": f"{{name: run, dir: {folder}, steps: 1000000, save_every: 20, loggers: []}}",
    }
    options = [f"{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "megatron_rl", "train", str(folder / "soak.yaml"), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return psutil.Popen(command, stdout=(folder / "output.txt").open("w"), stderr=subprocess.STDOUT, env=env)


def wait_for(process: psutil.Popen, folder: Path, steps: int) -> None:
    """Wait until that many steps are in the log."""
    log, limit = folder / "run/log.jsonl", time.monotonic() + LIMIT_S
    while not log.exists() or log.read_text().count('"kind": "step"') < steps:
        if process.poll() is not None or time.monotonic() > limit:
            sys.exit(f"no {steps} steps: {(folder / 'output.txt').read_text()[-2000:]}")
        time.sleep(0.05)


def measure(process: psutil.Popen, seen: dict[int, Seen]) -> int:
    """Add one measurement of every process of the run. Return how many there are. One may end meanwhile."""
    tree = [process, *process.children(recursive=True)]
    for one in tree:
        with suppress(psutil.NoSuchProcess):
            rss, files, threads = one.memory_info().rss / MIB, one.num_fds(), one.num_threads()
            entry = seen.setdefault(one.pid, Seen(one.name()))
            entry.rss.append(rss)
            entry.files.append(files)
            entry.threads.append(threads)
    return len(tree)


def end(process: psutil.Popen) -> None:
    """Kill every process of the run."""
    tree: list[psutil.Process] = [process]
    with suppress(psutil.NoSuchProcess):
        tree += process.children(recursive=True)
    for one in tree:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def slope(values: list[float]) -> float:
    """Return the growth for each 100 steps, of measurements after the warm-up."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) * 100 / EVERY


def report(seen: dict[int, Seen], counts: list[int], as_json: bool) -> bool:
    """Print a table of processes, of which there were `counts` at each measurement. Return whether something grows."""
    before, after = max(counts[: len(counts) // 2]), max(counts[len(counts) // 2 :])
    rows, grows = [], after > before
    print(f"{'process':18} {'MB':>8} {'MB/100 steps':>13} {'files':>12} {'threads':>12}")
    for entry in seen.values():
        if len(entry.rss) < len(counts) - 1:
            continue  # a process of one checkpoint
        half = len(entry.rss) // 2
        growth = slope(entry.rss[half:])
        files, threads = ((max(values[:half]), max(values[half:])) for values in (entry.files, entry.threads))
        rows.append({"process": entry.name, "mb": entry.rss[-1], "growth": growth, "files": files, "threads": threads})
        grows |= growth > MOST_MB or files[1] > files[0] or threads[1] > threads[0]
        print(
            f"{entry.name:18} {entry.rss[-1]:8.0f} {growth:13.2f} {f'{files[0]} -> {files[1]}':>12} "
            f"{f'{threads[0]} -> {threads[1]}':>12}"
        )
    print(f"processes at a time: {before} -> {after}")
    if as_json:
        print(json.dumps({"steps": EVERY * len(counts), "counts": [before, after], "processes": rows}))
    return grows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.steps < LEAST:
        parser.error(f"--steps is {args.steps}: a line needs at least {LEAST}")
    seen: dict[int, Seen] = {}
    counts = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [f"{a}+{b}={a + b}" for a in range(51) for b in range(51)]
        process = start(make_tiny_model(folder / "model", texts, seed=0), folder)
        try:
            for steps in range(EVERY, args.steps + 1, EVERY):
                wait_for(process, folder, steps)
                counts.append(measure(process, seen))
        finally:
            end(process)
    sys.exit(report(seen, counts, args.json))


if __name__ == "__main__":
    main()

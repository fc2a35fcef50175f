"""Shared parts of the comparisons of methods: warm start, runs, columns of their logs, curves over seeds.

Every run is `megatron-rl train CONFIG` with a method's overrides and a seed. Finished runs are kept, so an interrupted
comparison can be resumed.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_rl.diagnostics import read_log
from megatron_rl.errors import UserError
from megatron_rl.launch.ranks import run_ranks
from megatron_rl.quickstart import ERROR_RATE, WARM_PASS_RATE
from megatron_rl.tiny_model import make_tiny_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WARM = Path("runs/compare/warm")
PASS_RATE = "eval/sampled"

Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """Comparison of methods that start from the same model.

    Attributes:
        config: the configuration that all methods share.
        runs: the folder of all runs.
        methods: the overrides of `config` for each method, by its name.
        warm: the model that all runs start from.
    """

    config: Path
    runs: Path
    methods: Mapping[str, Sequence[str]]
    warm: Path = WARM

    def arguments(self, description: str | None, steps: int) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--methods", nargs="+", choices=self.methods, default=list(self.methods))
        parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
        parser.add_argument("--steps", type=int, default=steps)
        parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the figure and its numbers")
        return parser.parse_args()

    def histories(self, methods: Sequence[str], seeds: Sequence[int], steps: int, jobs: int) -> dict[str, list[Log]]:
        """Return the logs of all seeds by method. Train the runs that do not exist yet.

        Args:
            methods: names of the methods.
            seeds: seeds of each method.
            steps: training steps of a run.
            jobs: runs at the same time.
        """
        warm_start(self.warm)
        self.runs.mkdir(parents=True, exist_ok=True)
        runs = [(method, seed) for seed in seeds for method in methods]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda run: self.train(run[0], run[1], steps), runs))
        return {method: [read_log(self.folder(method, seed)) for seed in seeds] for method in methods}

    def folder(self, method: str, seed: int) -> Path:
        return self.runs / f"{re.sub('[^a-z0-9]+', '-', method.lower())}-{seed}"

    def train(self, method: str, seed: int, steps: int) -> None:
        """Train one run, or resume it, unless it is finished. Raises UserError if it fails."""
        target = self.folder(method, seed)
        done = target.is_dir() and any(r["kind"] == "eval" and r["step"] == steps for r in read_log(target))
        if done:
            return
        overrides = [f"run.name={target.name}", f"run.dir={self.runs}", f"model.path={self.warm}", f"run.seed={seed}"]
        resume = ["--resume"] if target.is_dir() else []
        command = [sys.executable, "-m", "megatron_rl", "train", *resume, str(self.config), *self.methods[method]]
        with (self.runs / f"{target.name}.out").open("w") as out:
            code = subprocess.run(
                [*command, *overrides, f"run.steps={steps}"], stdout=out, stderr=out, check=False
            ).returncode
        if code:
            raise UserError(f"{target.name} ended with code {code}: see {out.name}")
        print(f"{target.name} done", flush=True)


def warm_start(warm: Path, **heads: int) -> None:
    """Make the warmed-up model of the quickstart in the folder `warm`, once. `heads` is passed to `make_tiny_model`."""
    if (warm / "config.json").is_file():
        return
    numbers, fresh = range(50), warm.parent / "fresh"
    make_tiny_model(fresh, [f"{a}+{b}={a + b}" for a in numbers for b in numbers], seed=0, **heads)
    options = ["--dest", str(warm), "--target", str(WARM_PASS_RATE), "--error-rate", str(ERROR_RATE)]
    options += ["--batch-size", "224", "--max-updates", "2000"]
    code = run_ranks(
        ["warmup", str(CONFIGS / "warmup.yaml"), f"model.path={fresh}", f"run.dir={warm.parent}", *options], 2
    )
    if code:
        raise UserError(f"the warm-up ended with code {code}")


def column(log: Log, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of the records that have the key."""
    found = [(r["step"], r[key]) for r in log if r.get(key) is not None]
    return np.array([s for s, _ in found]), np.array([v for _, v in found], dtype=np.float64)


def pass_rates(logs: Sequence[Log]) -> dict[str, float]:
    """Return held-out pass rates, sampled: means before and after, range over seeds, mean over all evaluations."""
    rates = np.array([column(log, PASS_RATE)[1] for log in logs])
    last = rates[:, -1]
    return {
        "before": float(rates[:, 0].mean()),
        "after": float(last.mean()),
        "after_min": float(last.min()),
        "after_max": float(last.max()),
        "mean_over_run": float(rates.mean()),
    }


def median_and_worst(
    logs: Sequence[Log], name: str, key: str, worst: Callable[[np.ndarray], float]
) -> dict[str, float | None]:
    """Return median and worst of a metric over the steps of all seeds; None if the log of a run lacks the key.

    Args:
        logs: one log per seed.
        name: prefix of the two keys that are returned.
        key: name of the metric in the logs.
        worst: reduces the values of all steps to the worst.
    """
    found = [column(log, key)[1] for log in logs]
    if not all(map(len, found)):
        return {f"{name}_median": None, f"{name}_worst": None}
    values = np.concatenate(found)
    return {f"{name}_median": float(np.median(values)), f"{name}_worst": float(worst(values))}


def curve(axes: Axes, logs: Sequence[Log], key: str, *, shade: bool = False, color: str, **more: Any) -> None:
    """Plot the mean of a metric over seeds against steps. Plot nothing if the log of a run lacks the key.

    Args:
        axes: where the curve is drawn.
        logs: one log per seed.
        key: name of the metric in the logs.
        shade: also shade the range over seeds.
        color: color of the curve.
        more: further options of `Axes.plot`.
    """
    columns = [column(log, key) for log in logs]
    if not all(len(steps) for steps, _ in columns):
        return
    steps, values = columns[0][0], np.array([v for _, v in columns])
    axes.plot(steps, values.mean(0), color=color, linewidth=1.4, **more)
    if shade:
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)

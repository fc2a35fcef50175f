"""Objectives side by side: same warm start, same task, same seeds, stale rollouts; one table and one plot.

Every run is `megatron-rl train configs/compare.yaml` with another objective and seed; finished runs are kept, so an
interrupted comparison goes on where it was.

    python benchmarks/compare.py [--seeds 0 1 2 --jobs 2 --steps 60 --out docs]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_rl.diagnostics import read_log
from megatron_rl.errors import UserError
from megatron_rl.launch import run_ranks
from megatron_rl.quickstart import CARELESS, WARM_PASS_RATE
from megatron_rl.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RC, RED, log_scale
from megatron_rl.training.tiny import make_tiny_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = Path("runs/compare")
METHODS = {
    "GRPO": ["objective.name=grpo", "objective.advantage=grpo"],
    "DPPO": ["objective.name=dppo_tv", "objective.advantage=mean", "objective.delta=0.15"],
    "DRPO": ["objective.name=drpo", "objective.advantage=mean", "objective.delta=0.15"],
    "ASymPO": ["objective.name=asympo", "objective.advantage=mean", "objective.p_low=0.02", "objective.p_high=0.95"],
    "ScaledPO": ["objective.name=scaled_po", "objective.advantage=mean"],
    "ERPD": [
        "objective={name: erpd, advantage: grpo, teacher: {name: sapo, denominator: trainer_old}, teacher_updates: 16, "
        "keep: [], save_every: 16, signals: [{teacher: last, denominator: old, updates: 4}]}",
        "optimizer.warmup_updates=0",  # each stage would warm up anew
    ],
}
COLOURS = dict(zip(METHODS, (GREY, BLUE, GREEN, ORANGE, PURPLE, RED), strict=True))
PASS_RATE = "eval/sampled"
TAILS = ("ratio/q01", "ratio/q99")
KL = "kl/k3"
STUDENT_KL = "erpd/student/kl"  # ERPD's own figure: KL(pi || pi_old) at the end of a step, not the mean over its updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of objectives.png and objectives.json")
    args = parser.parse_args()
    warm_start(RUNS)
    runs = [(method, seed) for seed in args.seeds for method in args.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(*run, args.steps), runs))
    histories = {method: [read_log(folder(method, seed)) for seed in args.seeds] for method in args.methods}
    rows = [summary(method, logs) for method, logs in histories.items()]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "objectives.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(histories, args.out / "objectives.png")
    show(rows)


def warm_start(runs: Path) -> None:
    """The quickstart's warmed-up model, made once."""
    if (runs / "warm" / "config.json").is_file():
        return
    numbers = range(50)
    make_tiny_model(runs / "fresh", [f"{a}+{b}={a + b}" for a in numbers for b in numbers], seed=0)
    options = ["--dest", str(runs / "warm"), "--target", str(WARM_PASS_RATE), "--careless", str(CARELESS)]
    options += ["--batch-size", "224", "--max-updates", "2000"]
    code = run_ranks(["warmup", str(CONFIGS / "warmup.yaml"), f"model.path={runs / 'fresh'}", f"run.dir={runs}", *options], 2)
    if code:
        raise UserError(f"the warm-up ended with code {code}")


def folder(method: str, seed: int) -> Path:
    return RUNS / f"{method.lower()}-{seed}"


def train(method: str, seed: int, steps: int) -> None:
    """One run, unless it is there already. Raises UserError when it fails."""
    target = folder(method, seed)
    done = target.is_dir() and any(r["kind"] == "eval" and r["step"] == steps for r in read_log(target))
    if done:
        return
    overrides = [f"run.name={target.name}", f"run.dir={RUNS}", f"model.path={RUNS / 'warm'}", f"run.seed={seed}"]
    resume = ["--resume"] if target.is_dir() else []
    command = [sys.executable, "-m", "megatron_rl", "train", *resume, str(CONFIGS / "compare.yaml"), *METHODS[method]]
    with (RUNS / f"{target.name}.out").open("w") as out:
        code = subprocess.run([*command, *overrides, f"run.steps={steps}"], stdout=out, stderr=out, check=False).returncode
    if code:
        raise UserError(f"{target.name} ended with code {code}: see {out.name}")
    print(f"{target.name} done", flush=True)


def column(log: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(r["step"], r[key]) for r in log if r.get(key) is not None]
    return np.array([s for s, _ in found]), np.array([v for _, v in found], dtype=np.float64)


def summary(method: str, logs: Sequence[Sequence[dict]]) -> dict:
    """What the table shows: means over seeds, and the range of the pass rate."""
    rates = np.array([column(log, PASS_RATE)[1] for log in logs])
    last = rates[:, -1]
    row = {
        "method": method,
        "before": float(rates[:, 0].mean()),
        "after": float(last.mean()),
        "after_min": float(last.min()),
        "after_max": float(last.max()),
        "mean_over_run": float(rates.mean()),
    }
    for name, key, worst in (
        ("q01", TAILS[0], np.min),
        ("q99", TAILS[1], np.max),
        ("k3", KL, np.max),
        ("student_kl", STUDENT_KL, np.max),
    ):
        found = [column(log, key)[1] for log in logs]
        row[f"{name}_median"] = float(np.median(np.concatenate(found))) if all(map(len, found)) else None
        row[f"{name}_worst"] = float(worst(np.concatenate(found))) if all(map(len, found)) else None
    learning = [
        sum(r.get(f"seconds/{p}") or 0 for p in ("update", "teacher", "student")) for log in logs for r in log if "loss" in r
    ]
    row["update_seconds"] = float(np.median(learning))
    return row


def draw(histories: dict[str, Sequence[Sequence[dict]]], path: Path) -> None:
    """Held-out pass rate, ratio tails and KL against steps: mean over seeds, range shaded."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        rate, tails, kl = figure.subplots(1, 3)
        for method, logs in histories.items():
            for axes, key in ((rate, PASS_RATE), (tails, TAILS[0]), (tails, TAILS[1]), (kl, KL), (kl, STUDENT_KL)):
                curves = [column(log, key) for log in logs]
                if not all(len(steps) for steps, _ in curves):
                    continue
                values = np.array([v for _, v in curves])
                label = method if key != TAILS[0] else None
                style = ":" if key == STUDENT_KL else "-"
                axes.plot(curves[0][0], values.mean(0), style, color=COLOURS[method], label=label, linewidth=1.4)
                if axes is rate:
                    low, high = values.min(0), values.max(0)
                    axes.fill_between(curves[0][0], low, high, color=COLOURS[method], alpha=0.12, linewidth=0)
        rate.set_title("held-out pass rate, sampled")
        tails.set_title("ratio pi / mu: 1 % and 99 % quantiles")
        kl.set_title("KL(mu || pi), k3; dotted: KL(student || old)")
        log_scale(tails)
        log_scale(kl)
        for axes in (rate, tails, kl):
            axes.set_xlabel("step")
        rate.legend(frameon=False, ncols=2)
        figure.savefig(path, dpi=160)


def show(rows: Sequence[dict]) -> None:
    table = Table("objective", "pass rate before", "after (range)", "mean over run", "q01", "q99", "k3", "update s")
    for row in rows:
        numbers = [f"{row[k]:.3g}" if row[k] is not None else "-" for k in ("q01_median", "q99_median", "k3_median")]
        after = f"{row['after']:.1%} ({row['after_min']:.1%} - {row['after_max']:.1%})"
        mean, seconds = f"{row['mean_over_run']:.1%}", f"{row['update_seconds']:.2f}"
        table.add_row(row["method"], f"{row['before']:.1%}", after, mean, *numbers, seconds)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

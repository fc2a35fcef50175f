"""Comparison of objectives with the same warm start, task and seeds, and stale rollouts: one table and one plot.

Every run is `megatron-rl train configs/compare.yaml` with another objective and seed. Finished runs are kept, so an
interrupted comparison can be resumed.

    python benchmarks/compare.py [--seeds 0 1 2 --jobs 2 --steps 60 --out docs]
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from comparison import CONFIGS, PASS_RATE, Comparison, Log, curve, median_and_worst, pass_rates
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_rl.report.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, RC, RED, log_scale

METHODS = {
    "GRPO": ["objective.name=grpo", "objective.advantage=grpo"],
    "DPPO": ["objective.name=dppo_tv", "objective.advantage=mean", "objective.delta=0.15"],
    "DRPO": ["objective.name=drpo", "objective.advantage=mean", "objective.delta=0.15"],
    "ASymPO": ["objective.name=asympo", "objective.advantage=mean", "objective.p_low=0.02", "objective.p_high=0.95"],
    "ScaledPO": ["objective.name=scaled_po", "objective.advantage=mean"],
    "ERPD": [
        "objective={name: erpd, advantage: grpo, teacher: {name: sapo, ratio_denominator: trainer_old}, "
        "teacher_updates: 16, keep: [], save_every: 16, signals: [{teacher: last, denominator: old, updates: 4}]}",
        "optimizer.warmup_updates=0",  # Each stage would warm up again.
    ],
}
COLORS = dict(zip(METHODS, (GRAY, BLUE, GREEN, ORANGE, PURPLE, RED), strict=True))
TAILS = ("ratio/q01", "ratio/q99")
KL = "kl/k3"
# ERPD's own metric: KL(pi || pi_old) at the end of a step, not the mean over its updates.
STUDENT_KL = "erpd/student/kl"


def main() -> None:
    comparison = Comparison(CONFIGS / "compare.yaml", Path("runs/compare"), METHODS)
    args = comparison.arguments(__doc__, steps=60)
    histories = comparison.histories(args.methods, args.seeds, args.steps, args.jobs)
    rows = [summary(method, logs) for method, logs in histories.items()]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "objectives.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(histories, args.out / "objectives.png")
    show(rows)


def summary(method: str, logs: Sequence[Log]) -> dict:
    """Return the row of a method: pass rates as means and range over seeds; other metrics as median and worst."""
    row = {"method": method, **pass_rates(logs)}
    for name, key, worst in (
        ("q01", TAILS[0], np.min),
        ("q99", TAILS[1], np.max),
        ("k3", KL, np.max),
        ("student_kl", STUDENT_KL, np.max),
    ):
        row |= median_and_worst(logs, name, key, worst)
    learning = [
        sum(r.get(f"seconds/{p}") or 0 for p in ("update", "teacher", "student"))
        for log in logs
        for r in log
        if "loss" in r
    ]
    row["update_seconds"] = float(np.median(learning))
    return row


def draw(histories: dict[str, list[Log]], path: Path) -> None:
    """Plot held-out pass rate, ratio tails and KL against steps.

    The curves are means over seeds. The range of the pass rate is shaded.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        rate, tails, kl = figure.subplots(1, 3)
        for method, logs in histories.items():
            color = COLORS[method]
            curve(rate, logs, PASS_RATE, shade=True, color=color, label=method)
            curve(tails, logs, TAILS[0], color=color)
            curve(tails, logs, TAILS[1], color=color, label=method)
            curve(kl, logs, KL, color=color, label=method)
            curve(kl, logs, STUDENT_KL, color=color, label=method, linestyle=":")
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

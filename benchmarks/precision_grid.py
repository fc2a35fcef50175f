"""Training precision x rollout precision: the mismatch between trainer and engine, and its effect on learning.

Every run is `megatron-rl train configs/precision_grid.yaml` with another pair of precisions and seed, from one warm
start whose matrices divide into blocks of 128 x 128. Finished runs are kept, so an interrupted grid can be resumed.

    python benchmarks/precision_grid.py [--seeds 0 --jobs 2 --steps 30 --out docs]

The first seed runs the whole grid. The other seeds run only the rows of bf16 engines and the unified cell.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from comparison import CONFIGS, Comparison, Log, column, pass_rates, warm_start
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_rl.report.style import BLUE, GRAY, GREEN, RC, log_scale

TRAIN = {
    "bf16": ["precision.recipe=none"],
    "tensorwise": ["precision.recipe=tensorwise"],
    "blockwise": ["precision.recipe=blockwise"],
}
ROLLOUT = {
    "bf16": ["precision.rollout=bf16"],
    "fp8": ["precision.rollout=fp8_blockwise", "precision.rollout_activations=fp8"],
    "fp8 pow2": ["precision.rollout=fp8_blockwise_pow2", "precision.rollout_activations=fp8"],
    "int8": ["precision.rollout=int8"],
}
METHODS = {f"{t} / {r}": [*TRAIN[t], *ROLLOUT[r]] for t in TRAIN for r in ROLLOUT}
AGAIN = [f"{t} / bf16" for t in TRAIN] + ["blockwise / fp8"]
COLORS = dict(zip(TRAIN, (GRAY, GREEN, BLUE), strict=True))
QUANTILES = ("ratio/min", "ratio/q01", "ratio/q05", "ratio/q95", "ratio/q99", "ratio/max")
OTHERS = ("kl/k3", "token_mult_prob_error", "dp/mean", "dp/max", "ratio/ess", "ratio/outside_half_two")


def main() -> None:
    warm = Path("runs/precision_grid/warm")
    comparison = Comparison(CONFIGS / "precision_grid.yaml", Path("runs/precision_grid"), METHODS, warm)
    args = comparison.arguments(__doc__, steps=30)
    warm_start(warm, heads=2, head_dim=128)
    histories = comparison.histories(args.methods, args.seeds[:1], args.steps, args.jobs)
    again = [name for name in args.methods if name in AGAIN]
    for name, logs in comparison.histories(again, args.seeds[1:], args.steps, args.jobs).items():
        histories[name] += logs
    rows = [summary(name, logs) for name, logs in histories.items()]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "precision.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(rows, args.out / "precision.png")
    show(rows)


def summary(name: str, logs: Sequence[Log]) -> dict:
    """Return a row: medians over the steps of all seeds.

    The mismatch is that of the first update of each step, in which trainer and engine have the same weights.
    """
    train, rollout = name.split(" / ")
    row = {"train": train, "rollout": rollout, "seeds": len(logs), **pass_rates(logs)}
    for key in (*QUANTILES, *OTHERS):
        row[key] = float(np.median(np.concatenate([column(log, f"mismatch/{key}")[1] for log in logs])))
    row["update_seconds"] = float(np.median(np.concatenate([column(log, "seconds/update")[1] for log in logs])))
    return row


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """Plot ratio quantiles and KL of every cell, by the precision of the engine."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        ratios, kl = figure.subplots(1, 2)
        for offset, train in enumerate(TRAIN):
            own = [row for row in rows if row["train"] == train]
            at = np.array([list(ROLLOUT).index(row["rollout"]) for row in own]) + 0.2 * (offset - 1)
            for low, high, width in (("ratio/q01", "ratio/q99", 1.5), ("ratio/q05", "ratio/q95", 5.0)):
                ratios.vlines(at, [r[low] for r in own], [r[high] for r in own], color=COLORS[train], linewidth=width)
            kl.bar(at, [row["kl/k3"] for row in own], width=0.18, color=COLORS[train], label=f"train {train}")
        ratios.set_title("ratio pi / mu at equal weights: 1-99 % (thin), 5-95 % (thick)")
        kl.set_title("KL(mu || pi) in nats a token, k3")
        for axes in (ratios, kl):
            axes.set_xticks(range(len(ROLLOUT)), [f"rollout {name}" for name in ROLLOUT])
        log_scale(kl)
        kl.legend(frameon=False)
        figure.savefig(path, dpi=160)


def show(rows: Sequence[Mapping]) -> None:
    table = Table(
        "train", "rollout", "seeds", "q01", "q05", "q95", "q99", "max", "k3", "mult. error", "|dp|", "pass rate", "s"
    )
    for row in rows:
        values = [f"{row[key]:.4f}" for key in ("ratio/q01", "ratio/q05", "ratio/q95", "ratio/q99", "ratio/max")]
        more = [f"{row['kl/k3']:.2e}", f"{row['token_mult_prob_error']:.4f}", f"{row['dp/mean']:.4f}"]
        rate = f"{row['before']:.1%} -> {row['after']:.1%} ({row['after_min']:.1%} - {row['after_max']:.1%})"
        cells = [row["train"], row["rollout"], str(row["seeds"]), *values, *more, rate, f"{row['update_seconds']:.2f}"]
        table.add_row(*cells)
    Console(width=190).print(table)


if __name__ == "__main__":
    main()

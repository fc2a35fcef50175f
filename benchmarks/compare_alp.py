"""Adaptive layerwise perturbation, the bypass ratio and masked importance sampling on stale, mismatched rollouts.

Every run is `megatron-rl train configs/compare_alp.yaml` with another method and seed, from the warm start of
`benchmarks/compare.py`. Finished runs are kept, so an interrupted comparison can be resumed.

    python benchmarks/compare_alp.py [--seeds 0 1 2 --jobs 2 --steps 40 --out docs]
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from comparison import CONFIGS, PASS_RATE, Comparison, Log, column, curve, median_and_worst, pass_rates
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_rl.diagnostics.mismatch import BINS
from megatron_rl.report.style import BLUE, GRAY, ORANGE, PURPLE, RC, RED, log_scale

SEQUENCE = ["objective.clip_low=0.5", "objective.clip_high=3.0", "objective.dual_clip=3.0"]
METHODS = {
    "GRPO bypass": ["objective.ratio_denominator=rollout"],
    "Token-MIS": [
        "objective.ratio_denominator=trainer_old",
        "objective.corrections=[{name: mis, threshold: 2.0, level: token}]",
    ],
    "Token-ALP": ["objective.ratio_denominator=rollout", "alp.enabled=true", "alp.level=token"],
    "Seq bypass": ["objective.ratio_denominator=rollout", "objective.ratio_level=sequence", *SEQUENCE],
    "Seq-ALP": ["objective.ratio_denominator=rollout", "alp.enabled=true", "alp.level=sequence", *SEQUENCE],
}
COLORS = dict(zip(METHODS, (GRAY, ORANGE, BLUE, PURPLE, RED), strict=True))
KL = "kl/k3"
SPIKE = 5.0  # A step is a spike if its KL is over this many times the median of its run.
LATE = 10  # number of last steps, which have many more trajectories than one evaluation


def main() -> None:
    comparison = Comparison(CONFIGS / "compare_alp.yaml", Path("runs/compare_alp"), METHODS)
    args = comparison.arguments(__doc__, steps=40)
    histories = comparison.histories(args.methods, args.seeds, args.steps, args.jobs)
    rows = [summary(method, logs) for method, logs in histories.items()]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "alp.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(histories, args.out / "alp.png")
    show(rows)


def summary(method: str, logs: Sequence[Log]) -> dict:
    """Return a row of the table. Median and worst are over the steps of all seeds.

    A metric that a method does not have is None.
    """
    row = {"method": method, "seeds": len(logs), **pass_rates(logs)}
    row["after_by_seed"] = [float(column(log, PASS_RATE)[1][-1]) for log in logs]
    row["best_by_seed"] = [float(column(log, PASS_RATE)[1].max()) for log in logs]
    row["late_by_seed"] = [float(column(log, "pass_rate")[1][-LATE:].mean()) for log in logs]
    for name, key, worst in (
        ("q01", "ratio/q01", np.min),
        ("q99", "ratio/q99", np.max),
        ("max", "ratio/max", np.max),
        ("k3", KL, np.max),
        ("mismatch_k3", "mismatch/kl/k3", np.max),
        ("grad_norm", "grad_norm", np.max),
        ("shift_p75", "alp/shift/p75", np.max),
        ("noise_q01", "alp/perturbed/ratio/q01", np.min),
        ("noise_q99", "alp/perturbed/ratio/q99", np.max),
        ("clean_q01", "alp/clean/ratio/q01", np.min),
        ("clean_q99", "alp/clean/ratio/q99", np.max),
        ("masked", "mis/masked", np.max),
    ):
        row |= median_and_worst(logs, name, key, worst)
    row["spikes"] = sum(spikes(column(log, KL)[1]) for log in logs)
    row["steps"] = sum(len(column(log, KL)[1]) for log in logs)
    ends = [column(log, "alp/sigma_mean")[1][-1:] for log in logs]
    row["sigma_end"] = float(np.mean(ends)) if all(map(len, ends)) else None
    row["envelope_p02"], row["envelope_p98"] = (envelope(logs, side) for side in ("p02", "p98"))
    return row


def spikes(values: np.ndarray) -> int:
    """Return the number of steps above SPIKE times the median of all steps."""
    return int((values > SPIKE * np.median(values)).sum())


def envelope(logs: Sequence[Log], side: str) -> list[float | None]:
    """Return the median over the steps of all seeds, per bin of the rollout probability.

    A bin that never had tokens is None.
    """
    found = [np.concatenate([column(log, f"envelope/{side}/{k}")[1] for log in logs]) for k in range(BINS)]
    return [float(np.median(values)) if len(values) else None for values in found]


def draw(histories: dict[str, list[Log]], path: Path) -> None:
    """Plot pass rate, ratio tails and KL against steps, and the envelope of the ratio by rollout probability.

    The curves are means over seeds.
    """
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(12, 7.6), layout="constrained")
        rate, tails, kl, binned = figure.subplots(2, 2).flat
        for method, logs in histories.items():
            color = COLORS[method]
            curve(rate, logs, PASS_RATE, shade=True, color=color, label=method)
            curve(tails, logs, "ratio/q01", color=color)
            curve(tails, logs, "ratio/q99", color=color)
            curve(kl, logs, KL, color=color)
            draw_envelope(binned, logs, color)
        rate.set_title("held-out pass rate, sampled")
        tails.set_title("ratio pi / mu: 1 % and 99 % quantiles")
        kl.set_title("KL(mu || pi), k3")
        binned.set_title("ratio pi / mu by rollout probability: 2 % and 98 %")
        binned.set_xlabel("mu of the token")
        for axes in (tails, kl, binned):
            log_scale(axes)
        for axes in (rate, tails, kl):
            axes.set_xlabel("step")
        rate.legend(frameon=False, ncols=2)
        figure.savefig(path, dpi=160)


def draw_envelope(axes: Axes, logs: Sequence[Log], color: str) -> None:
    centers = (np.arange(BINS) + 0.5) / BINS
    for side in ("p02", "p98"):
        values = np.array([np.nan if value is None else value for value in envelope(logs, side)])
        axes.plot(centers, values, color=color, linewidth=1.4, marker="o", markersize=3)


def show(rows: Sequence[dict]) -> None:
    table = Table(
        "method", "before", "after (range)", "mean over run", "last steps", "q01", "q99", "max", "k3", "spikes", "sigma"
    )
    for row in rows:
        pairs = [f"{row[f'{k}_median']:.3g} ({row[f'{k}_worst']:.3g})" for k in ("q01", "q99", "max", "k3")]
        after = f"{row['after']:.1%} ({row['after_min']:.1%} - {row['after_max']:.1%})"
        sigma = f"{row['sigma_end']:.3g}" if row["sigma_end"] is not None else "-"
        late = f"{np.mean(row['late_by_seed']):.1%}"
        spiky = f"{row['spikes']} / {row['steps']}"
        table.add_row(
            row["method"], f"{row['before']:.1%}", after, f"{row['mean_over_run']:.1%}", late, *pairs, spiky, sigma
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()

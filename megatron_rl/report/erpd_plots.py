"""The figures of ERPD rounds (arXiv 2605.25582): how far the teacher moved, and how far the student followed."""

from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_rl.report.history import History
from megatron_rl.report.panel import Panel
from megatron_rl.report.style import BLUE, GRAY, GREEN, ORANGE, finish, line, log_scale

_KL = (("erpd/teacher/kl", "teacher", ORANGE), ("erpd/student/kl", "student", BLUE))
_RATES = (("erpd/teacher/greedy", "teacher, greedy", ORANGE), ("eval/greedy", "student, greedy", BLUE))


def _draw_kl(ax: Axes, history: History) -> None:
    columns = [(history.column(key), label, color) for key, label, color in _KL]
    for column, label, color in columns:
        line(ax, column, label, color)
    values = np.concatenate([column.values for column, _, _ in columns])
    if (values > 0).all() and values.max() > 10 * values.min():
        log_scale(ax)
    finish(ax, "KL(pi || pi_old), nats per token")


def _draw_rates(ax: Axes, history: History) -> None:
    for key, label, color in _RATES:
        column = history.column(key)
        # The student's rate is logged with the number of completed steps, the teacher's with the step in progress.
        steps = column.steps + key.startswith("erpd")
        ax.plot(steps, column.values, color=color, label=label, marker="o", markersize=4.5)
    finish(ax, "pass rate, held-out problems", share=True)


def _draw_shift(ax: Axes, history: History) -> None:
    """Draw bars for the tokens in each bin and, on the right axis, points for how far the student followed."""
    record = _last_round(history)
    edges, count = np.array(record["erpd/shift/edges"]), np.array(record["erpd/shift/count"])
    places = np.arange(len(count))
    ax.bar(places, count, 0.9, color=GRAY, alpha=0.6, label="tokens")
    ax.set_xticks(places, [f"{low:g}-{high:g}" for low, high in pairwise(edges)] + [f">{edges[-1]:g}"])
    ax.tick_params(axis="x", labelrotation=35)
    ax.set_xlabel("|log pi_e - log pi_old|")
    ax.set_ylabel("tokens")
    ax.grid(visible=False, axis="x")
    right = ax.twinx()
    right.grid(visible=False)
    for name, color in (("mean", BLUE), ("median", GREEN)):
        values = np.array(record[f"erpd/shift/{name}"], dtype=np.float64)
        right.plot(places, values, color=color, marker="o", markersize=4, label=name)
    right.axhline(1, color=GRAY, linewidth=0.8, linestyle="--")
    if right.get_ylim()[1] > 50:
        right.set_yscale("log")
    right.set_ylabel("student's shift / teacher's")
    (bars, names), (curves, more) = ax.get_legend_handles_labels(), right.get_legend_handles_labels()
    ax.set_title(ax.get_title(loc="left"), pad=26)
    right.legend([*bars, *curves], [*names, *more], loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=3)


def _draw_stages(ax: Axes, history: History) -> None:
    record = _last_round(history)
    right = ax.twinx()
    right.grid(visible=False)
    for side, name, color in ((ax, "teacher", ORANGE), (right, "student", BLUE)):
        losses = np.array(record[f"erpd/{name}/loss"], dtype=np.float64)
        side.plot(np.arange(1, len(losses) + 1), losses, color=color, marker="o", markersize=3)
        side.set_ylabel(f"{name}'s loss", color=color)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_xlabel("update of the stage")


def _last_round(history: History) -> dict[str, Any]:
    return next(record for record in reversed(history.records) if record.get("kind") == "erpd")


ERPD_PANELS = (
    Panel(
        "erpd_kl",
        "ERPD: distance from the old policy",
        "Reverse KL of each round's teacher and student to the policy that sampled its batch, mean of r log r - r + 1.",
        ("erpd/student/kl",),
        _draw_kl,
    ),
    Panel(
        "erpd_rates",
        "ERPD: teacher and student",
        "Held-out greedy pass rate of the teacher, and of the student distilled from it.",
        ("erpd/teacher/greedy",),
        _draw_rates,
    ),
    Panel(
        "erpd_shift",
        "ERPD: what the student took over, last round",
        "Tokens by how far the teacher moved them, and the share of that shift that the student followed.",
        ("erpd/student/kl",),
        _draw_shift,
    ),
    Panel("erpd_stages", "ERPD: losses of the last round", "One point an update.", ("erpd/student/kl",), _draw_stages),
)

"""The figures of a study's report. Each is drawn from rows that are also written as CSV."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from megatron_rl.report.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, RC, RED, log_scale
from megatron_rl.study.figure_tables import (
    Row,
    collapse_rows,
    forest_rows,
    growth_rows,
    reward_rows,
    run_rows,
    size_rows,
    write_csv,
)
from megatron_rl.study.sentences import EQUIVALENT, HIGHER, LOWER, label
from megatron_rl.study.study_data import StudyData

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#5aa9c9", "#9a7b3f", "#c46fa5")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#1d2530"
_RESULT_COLORS = {EQUIVALENT: GREEN, LOWER: RED, HIGHER: BLUE}
_COLUMNS = 3  # panels side by side
_HALF = (6.4, 4.4)  # inches of a figure that shares its row with another


@dataclass(frozen=True)
class StudyFigure:
    """One figure of a report: `name`.png and `name`.csv, and the words around it."""

    name: str
    title: str
    caption: str
    wide: bool


class Looks:
    """One color and line for each arm, the same in all figures; the reference is dark."""

    def __init__(self, arms: Sequence[str], reference: str | None) -> None:
        self.reference = reference
        others = [arm for arm in arms if arm != reference]
        self.at = {arm: at for at, arm in enumerate(others)}

    def color(self, arm: str) -> str:
        """Return the color of an arm."""
        return _INK if arm == self.reference else _COLORS[self.at[arm] % len(_COLORS)]

    def line(self, arm: str) -> str:
        """Return the line style of an arm: another one once the colors are used up."""
        return "-" if arm == self.reference else _LINES[self.at[arm] // len(_COLORS) % len(_LINES)]


def save_figures(data: StudyData, verdict: dict[str, Any], folder: Path) -> list[StudyFigure]:
    """Write PNG and CSV of every figure for which the study has numbers, and return the figures in order.

    Args:
        data: the study; without a finished cell there is nothing to draw.
        verdict: its verdict.
        folder: where the files go; it exists.
    """
    if not data.groups:
        return []
    looks, unit = Looks(data.record["arms"], data.reference), 100.0 if verdict["points"] else 1.0
    reward = "held-out pass rate (%)" if verdict["points"] else "held-out reward"
    drawn = []
    with matplotlib.rc_context(RC):
        forest = forest_rows(verdict)
        if forest:
            _save(folder, "differences", forest, _forest(forest, verdict, unit))
            drawn.append(_forest_words(verdict))
        rows = reward_rows(data)
        _save(folder, "reward_curves", rows, _bands(rows, looks, reward, unit))
        drawn.append(StudyFigure("reward_curves", "Reward", f"Mean over seeds; shaded: P2 to P98 {_over(rows)}.", True))
        sizes = size_rows(verdict)
        runs = [row for row in run_rows(data) if row["mismatch_k3"] != ""]
        if runs:
            growth = growth_rows(data)
            _save(folder, "mismatch_growth", growth, _bands(growth, looks, "mismatch k3 (nats/token)", 1.0, log=True))
            text = f"Geometric mean over seeds; shaded: P2 to P98 {_over(growth)}."
            drawn.append(StudyFigure("mismatch_growth", "Mismatch along the run", text, True))
            _save(folder, "reward_against_mismatch", runs, _scatter(runs, looks, reward, unit))
            text = "One point a run: its last reward against its mean mismatch. Not a cause: arms differ in both."
            drawn.append(StudyFigure("reward_against_mismatch", "Reward against mismatch", text, False))
        if sizes:
            _save(folder, "mismatch_against_size", sizes, _sizes(sizes, looks))
            text = f"Geometric mean over seeds with its {_percent(verdict)} interval (t over seeds)."
            drawn.append(StudyFigure("mismatch_against_size", "Mismatch against size", text, False))
        collapse = collapse_rows(data, verdict)
        _save(folder, "collapse", collapse, _survival(collapse, looks, wide=bool(sizes)))
        text = f"Share of runs that have not collapsed (Kaplan-Meier), right: {_percent(verdict)} intervals at the end."
        drawn.append(StudyFigure("collapse", "Collapse", text, bool(sizes)))
    return drawn


def _save(folder: Path, name: str, rows: list[Row], figure: Figure) -> None:
    write_csv(rows, folder / f"{name}.csv")
    figure.savefig(folder / f"{name}.png", dpi=150)


def _forest_words(verdict: dict[str, Any]) -> StudyFigure:
    thin = f"Thin line: {_percent(verdict)} interval."
    margin = verdict["margin"]
    thick = f" Thick line: {100 * (1 - 2 * verdict['alpha']):.4g} % interval of the equivalence test." if margin else ""
    band = " Shaded: the margin within which a difference counts as equal." if margin else ""
    title = f"Difference from {verdict['reference']} at the last evaluation"
    return StudyFigure("differences", title, thin + thick + band, True)


def _forest(rows: list[Row], verdict: dict[str, Any], unit: float) -> Figure:
    figure = Figure(figsize=(11.5, 1.1 + 0.36 * len(rows)), layout="constrained")
    ax = figure.subplots()
    if verdict["margin"]:
        ax.axvspan(-verdict["margin"] * unit, verdict["margin"] * unit, color="#e9f3ee", zorder=0)
    ax.axvline(0, color=_INK, linewidth=0.9, zorder=1)
    for y, row in enumerate(rows):
        color = _RESULT_COLORS.get(row["result"], GRAY)
        if row["low"] is not None:
            ax.plot([row["low"] * unit, row["high"] * unit], [y, y], color=color, linewidth=1.3)
        if row["tost_low"] not in ("", None):
            ax.plot([row["tost_low"] * unit, row["tost_high"] * unit], [y, y], color=color, linewidth=4.5, alpha=0.55)
        ax.plot(row["difference"] * unit, y, marker="o", color=color, markersize=6.5)
        seeds = "one seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
        ax.annotate(
            f"{row['difference'] * unit:+{'.1f' if unit > 1 else '.3g'}}   {row['result']}, {seeds}",
            (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=color,
        )  # fmt: skip
    ax.set_yticks(range(len(rows)), [label(row["arm"], row["size"]) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"reward minus that of {verdict['reference']}" + (" (points)" if unit > 1 else ""))
    return figure


def _bands(rows: list[Row], looks: Looks, ylabel: str, unit: float, *, log: bool = False) -> Figure:
    """Draw mean and P2-P98 of each arm against steps, one panel a size."""

    def draw(ax: Axes, mine: list[Row], arm: str) -> None:
        steps = [row["step"] for row in mine]
        mean, low, high = (np.array([row[name] for row in mine]) * unit for name in ("mean", "p02", "p98"))
        color = looks.color(arm)
        ax.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0)
        marker = "o" if len(steps) <= 15 else None
        ax.plot(steps, mean, color=color, linestyle=looks.line(arm), label=arm, marker=marker, markersize=3.5)

    def finish_panel(ax: Axes) -> None:
        if log:
            log_scale(ax)

    return _panels(rows, draw, finish_panel, ylabel)


def _survival(rows: list[Row], looks: Looks, *, wide: bool) -> Figure:
    ends = {row["size"]: max(one["step"] for one in rows if one["size"] == row["size"]) for row in rows}

    def draw(ax: Axes, mine: list[Row], arm: str) -> None:
        steps = [row["step"] for row in mine]
        color = looks.color(arm)
        at = 0 if arm == looks.reference else 1 + looks.at[arm]
        # Arms without a collapse would hide each other at 1.
        share = np.array([row["share"] for row in mine]) - 0.012 * at
        # Bands of several arms would hide each other too: the interval of the last step stands beside the curves.
        last = ends[mine[0]["size"]]
        beside = last * (1.03 + 0.02 * at)
        ax.plot([beside, beside], [mine[-1]["low"], mine[-1]["high"]], color=color, linewidth=1.6, alpha=0.6)
        ax.step([*steps, last], [*share, share[-1]], where="post", color=color, linestyle=looks.line(arm), label=arm)

    def finish_panel(ax: Axes) -> None:
        ax.set_ylim(-0.1, 1.05)

    return _panels(rows, draw, finish_panel, "share of runs not collapsed", wide=wide)


def _panels(
    rows: list[Row],
    draw: Callable[[Axes, list[Row], str], None],
    end: Callable[[Axes], None],
    ylabel: str,
    *,
    wide: bool = True,
) -> Figure:
    """Draw one panel a size with all its arms, and one legend above all panels."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    columns = 2 if len(sizes) == 4 else min(len(sizes), _COLUMNS)
    lines = -(-len(sizes) // columns)
    size = (11.5, 0.6 + 3.3 * lines) if wide else _HALF
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for at, ax in enumerate(axes.flat):
        if at >= len(sizes):
            ax.set_axis_off()
            continue
        here = [row for row in rows if row["size"] == sizes[at]]
        for arm in dict.fromkeys(row["arm"] for row in here):
            draw(ax, [row for row in here if row["arm"] == arm], arm)
        if sizes[at]:
            ax.set_title(sizes[at])
        ax.set_xlabel("step")
        ax.set_ylabel(ylabel if at % columns == 0 else "")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        end(ax)
    _legend_above_all(figure, axes)
    return figure


def _legend_above_all(figure: Figure, axes: np.ndarray) -> None:
    columns = 6 if figure.get_figwidth() > _HALF[0] else 4
    named = {text: handle for ax in axes.flat for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    if len(named) > 1:
        figure.legend(list(named.values()), list(named), loc="outside upper left", ncols=min(len(named), columns))


def _scatter(rows: list[Row], looks: Looks, ylabel: str, unit: float) -> Figure:
    figure = Figure(figsize=_HALF, layout="constrained")
    ax = figure.subplots()
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for row in rows:
        marker = _MARKERS[sizes.index(row["size"]) % len(_MARKERS)]
        color = looks.color(row["arm"])
        ax.plot(row["mismatch_k3"], row["reward"] * unit, marker=marker, color=color, alpha=0.8, markersize=5.5)
    ax.set_xscale("log")
    ax.set_xlabel("mismatch k3 (nats/token), geometric mean of the run")
    ax.set_ylabel(ylabel)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        ax.plot([], [], marker="o", linestyle="", color=looks.color(arm), label=arm)
    for at, size in enumerate(sizes if len(sizes) > 1 else []):
        ax.plot([], [], marker=_MARKERS[at % len(_MARKERS)], linestyle="", color=GRAY, label=size)
    _legend_above_all(figure, np.array([ax]))
    return figure


def _sizes(rows: list[Row], looks: Looks) -> Figure:
    figure = Figure(figsize=_HALF, layout="constrained")
    ax = figure.subplots()
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        x, y = [row["parameters"] for row in mine], np.array([row["value"] for row in mine])
        ends = [[np.nan if row[name] is None else row[name] for row in mine] for name in ("low", "high")]
        reach = np.abs(np.array(ends, dtype=np.float64) - y)
        ax.errorbar(
            x, y, yerr=reach, color=looks.color(arm), linestyle=looks.line(arm), marker="o", markersize=4.5,
            capsize=2.5, elinewidth=1.1, label=arm,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    log_scale(ax)
    ax.set_xlabel("parameters")
    ax.set_ylabel("mismatch k3 (nats/token)")
    _legend_above_all(figure, np.array([ax]))
    return figure


def _over(rows: list[Row]) -> str:
    """Return over how many seeds an envelope is."""
    least, most = min(row["seeds"] for row in rows), max(row["seeds"] for row in rows)
    if most == 1:
        return "of one seed, which is no spread at all"
    return f"of {most} seeds" if least == most else f"of {least} to {most} seeds"


def _percent(verdict: dict[str, Any]) -> str:
    return f"{100 * (1 - verdict['alpha']):.4g} %"

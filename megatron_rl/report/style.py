"""The common style of all figures."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_rl.report.history import Series

BLUE, ORANGE, GREEN, PURPLE, RED, GRAY = "#2563a8", "#d97a1e", "#2a9070", "#7a5cb8", "#c2413b", "#8a94a3"

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "axes.labelcolor": "#3d4653",
    "axes.edgecolor": "#c3cad3",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebef",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b6573",
    "ytick.color": "#5b6573",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "white",
}

_SMOOTH_FROM = 40  # from this number of records on, a curve gets a running mean


def line(ax: Axes, column: Series, label: str, color: str, **more: Any) -> None:
    """Draw a curve; a long one as its running mean over the faint original.

    Args:
        ax: the axes.
        column: steps and values.
        label: name in the legend.
        color: color of the curve.
        **more: passed to `Axes.plot`.
    """
    window = max(1, len(column) // 20) if len(column) >= _SMOOTH_FROM else 1
    marker = "o" if len(column) <= 15 else None
    if window == 1:
        ax.plot(column.steps, column.values, color=color, label=label, marker=marker, markersize=3.5, **more)
        return
    ax.plot(column.steps, column.values, color=color, alpha=0.25, linewidth=0.9)
    ax.plot(column.steps, running_mean(column.values, window), color=color, label=label, **more)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over about `window` values around each value, over fewer at the ends."""
    reach = window // 2
    total = np.cumsum(np.concatenate([[0.0], values]))
    at = np.arange(len(values))
    start, stop = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def finish(ax: Axes, ylabel: str, *, share: bool = False, legend: bool = True) -> None:
    """Set axis labels and whole steps on the x axis; add a legend if there is more than one curve.

    Args:
        ax: the axes.
        ylabel: label of the y axis.
        share: the y axis is [0, 1].
        legend: False for no legend.
    """
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if share:
        ax.set_ylim(-0.03, 1.03)
    if legend and len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(loc="best")


def legend_above(ax: Axes) -> None:
    """Put the legend in one row between title and axes, where it covers no curve."""
    ax.set_title(ax.get_title(loc="left"), pad=26)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=6, columnspacing=1.2, borderaxespad=0.2)


def log_scale(ax: Axes) -> None:
    """Set a logarithmic y axis: plain numbers for a small range, powers of ten for a large one."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = np.log10(high / low)
    if decades < 4:
        subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())

"""The figure of attributions: how much of the mismatch each source causes."""

import numpy as np
from matplotlib.axes import Axes

from megatron_rl.diagnostics.score_chain import SOURCES
from megatron_rl.report.history import History
from megatron_rl.report.panel import Panel
from megatron_rl.report.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, finish

_COLORS = dict(zip(SOURCES, (GRAY, BLUE, ORANGE, RED, PURPLE, GREEN, "#c9a227"), strict=True))


def _draw_sources(ax: Axes, history: History) -> None:
    """Draw one stacked bar per attribution: mean |delta| of each source.

    A stack exceeds the mark of the total where sources cancel.
    """
    steps, table = history.table([f"attribution/{name}/mean_abs" for name in (*SOURCES, "total")])
    places, bottom = np.arange(table.shape[1]), np.zeros(table.shape[1])
    for name, height in zip(SOURCES, table, strict=False):
        if height.any():
            ax.bar(places, height, 0.7, bottom=bottom, color=_COLORS[name], label=name, linewidth=0)
        bottom = bottom + height
    ax.plot(places, table[-1], color="black", marker="_", markersize=14, linestyle="none", label="total")
    finish(ax, "mean |delta|, nats", legend=False)
    every = max(1, len(places) // 12)
    ax.set_xticks(places[::every], [f"{step}" for step in steps[::every]])
    ax.set_xlabel("steps done")
    ax.grid(visible=False, axis="x")
    ax.set_ylim(0, 1.35 * float(bottom.max()) or None)
    ax.legend(loc="upper left", ncols=4)


ATTRIBUTION_PANELS = (
    Panel(
        "attribution",
        "Sources of the mismatch",
        "What each source adds to the log ratio of freshly sampled tokens, mean of its size, by steps done. The mark "
        "is the whole log ratio: sources of opposite sign cancel.",
        ("attribution/total/mean_abs",),
        _draw_sources,
    ),
)

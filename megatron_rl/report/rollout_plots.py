"""The figures of rollouts that run ahead of the trainer: the age of their tokens, and the divergence by age."""

from matplotlib.axes import Axes

from megatron_rl.report.history import History
from megatron_rl.report.panel import Panel
from megatron_rl.report.style import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, finish, line, log_scale

_COLORS = (BLUE, ORANGE, PURPLE, GREEN, RED, GRAY)
_BY_AGE = tuple((f"mismatch/stale_{age}/k3", f"{age}", color) for age, color in enumerate(_COLORS))
# Logged only if some token is older than the trained weights.
_OLDER = tuple(key for key, _, _ in _BY_AGE[1:])


def _draw_staleness(ax: Axes, history: History) -> None:
    for name, color in (("max", ORANGE), ("mean", BLUE)):
        line(ax, history.column(f"staleness/{name}"), name, color)
    finish(ax, "versions")
    ax.set_ylim(bottom=0)


def _draw_by_age(ax: Axes, history: History) -> None:
    positive = True
    for key, age, color in _BY_AGE:
        if history.has(key):
            column = history.column(key)
            positive &= bool((column.values > 0).all())
            ax.plot(column.steps, column.values, color=color, label=age, marker="o", markersize=3)
    if positive:
        log_scale(ax)
    finish(ax, "k3 of mu against pi, nats per token")


ROLLOUT_PANELS = (
    Panel("staleness", "Staleness", "Of trained tokens, in weight versions.", _OLDER, _draw_staleness),
    Panel(
        "by_staleness",
        "Divergence by staleness",
        "First update of a step; one curve for tokens sampled by weights so many versions old. 0 is the mismatch of "
        "engine and trainer at equal weights.",
        _OLDER,
        _draw_by_age,
    ),
)

"""The figures of a report. Each is a function from a History to one pair of axes."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_rl.report.attribution_plots import ATTRIBUTION_PANELS
from megatron_rl.report.erpd_plots import ERPD_PANELS
from megatron_rl.report.history import History
from megatron_rl.report.panel import Panel
from megatron_rl.report.rollout_plots import ROLLOUT_PANELS
from megatron_rl.report.style import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    RC,
    RED,
    finish,
    legend_above,
    line,
    log_scale,
    running_mean,
)

_FAN = ("min", "q01", "q05", "q25", "q50", "q75", "q95", "q99", "max")
_FAN_REACH = 1e3
_NEAR_ONE = 0.05  # ratios that are all nearer to 1 are drawn as their deviation from it
_BARS = 80  # up to this number of steps, each step has its own bar
_SECONDS = (
    ("rollout", BLUE),
    ("reward", GREEN),
    ("update", ORANGE),
    ("teacher", RED),
    ("student", ORANGE),
    ("sync", PURPLE),
)


def save_panels(history: History, folder: Path) -> list[Panel]:
    """Write one PNG for every panel for which the log has numbers; return those panels in order."""
    drawn = [panel for panel in (*PANELS, *ROLLOUT_PANELS, *ATTRIBUTION_PANELS, *ERPD_PANELS) if panel.shown(history)]
    with matplotlib.rc_context(RC):
        for panel in drawn:
            figure = Figure(figsize=(6.4, 3.5), layout="constrained")
            panel.on(figure.subplots(), history)
            figure.savefig(folder / f"{panel.name}.png", dpi=160)
    return drawn


def plot_summary(run_folder: Path | str, out_png: Path | str) -> None:
    """Draw one 2x2 picture of a run: reward, held-out pass rate, KL, ratio quantiles.

    Raises UserError if there is no log.
    """
    history = History.of(Path(run_folder))
    chosen = [panel for panel in PANELS if panel.name in ("reward", "held_out", "kl", "ratio")]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(11.5, 6.6), layout=ConstrainedLayoutEngine(hspace=0.08, wspace=0.05))
        for ax, panel in zip(figure.subplots(2, 2).flat, chosen, strict=True):
            if panel.shown(history):
                panel.on(ax, history)
            else:
                ax.set_axis_off()
        figure.savefig(out_png, dpi=150)


def _curves(
    ylabel: str, *curves: tuple[str, str, str], share: bool = False, zero: bool = False
) -> Callable[[Axes, History], None]:
    """Return a function that draws curves, each given as (key, label, color).

    With `share` the axis is [0, 1]. With `zero` it starts at 0.
    """

    def draw(ax: Axes, history: History) -> None:
        for key, label, color in curves:
            if history.has(key):
                line(ax, history.column(key), label, color)
        finish(ax, ylabel, share=share)
        if zero:
            ax.set_ylim(bottom=0)

    return draw


def _draw_reward(ax: Axes, history: History) -> None:
    reward, rate = history.column("reward/mean"), history.column("pass_rate")
    same = len(reward) == len(rate) and np.allclose(reward.values, rate.values)
    if len(reward) and not same:
        line(ax, reward, "mean reward", BLUE)
    if len(rate):
        line(ax, rate, "mean reward = pass rate" if same else "pass rate", BLUE if same else GREEN)
    values = np.concatenate([reward.values, rate.values])
    finish(ax, "pass rate" if same else "reward, pass rate", share=bool(values.min() >= 0 and values.max() <= 1))


def _draw_held_out(ax: Axes, history: History) -> None:
    kinds = [(key, label, color) for key, label, color in _HELD_OUT if history.has(key)]
    columns = [history.column(key) for key, _, _ in kinds]
    if max(len(column) for column in columns) > 2:
        for column, (_, label, color) in zip(columns, kinds, strict=True):
            ax.plot(column.steps, column.values, color=color, label=label, marker="o", markersize=4.5)
            for at in (0, -1):
                ax.annotate(
                    f"{column.values[at]:.0%}",
                    (column.steps[at], column.values[at]),
                    (0, 7 if color == GREEN else -14),
                    textcoords="offset points",
                    ha="center",
                    color=color,
                    fontsize=8.5,
                )
        finish(ax, "pass rate, held-out problems", share=True)
        return
    width = 0.8 / len(kinds)
    for at, (column, (_, label, color)) in enumerate(zip(columns, kinds, strict=True)):
        places = np.arange(len(column)) + (at - (len(kinds) - 1) / 2) * width
        bars = ax.bar(places, column.values, width * 0.92, color=color, label=label)
        ax.bar_label(bars, [f"{value:.0%}" for value in column.values], padding=2, color="#3d4653")
    longest = max(columns, key=len)
    names = ["before", "after"] if len(longest) == 2 else ["evaluation"]
    ax.set_xticks(
        range(len(longest)), [f"{name}\nstep {step}" for name, step in zip(names, longest.steps, strict=True)]
    )
    ax.grid(visible=False, axis="x")
    ax.set_ylim(0, 1.12)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.set_ylabel("pass rate, held-out problems")
    if len(kinds) > 1:
        ax.legend(loc="upper left")


def _draw_kl(ax: Axes, history: History) -> None:
    curves = [(key, label, color) for key, label, color in _KL if history.has(key)]
    values = np.concatenate([history.column(key).values for key, _, _ in curves])
    for key, label, color in curves:
        line(ax, history.column(key), label, color, linestyle="--" if key.startswith("mismatch") else "-")
    sizes = np.abs(values[values != 0])
    if len(sizes) and sizes.max() > 30 * sizes.min():
        if (values > 0).all():
            log_scale(ax)
        else:
            # k1 changes sign: the axis is linear over the negative range and logarithmic far outside it.
            linear = float(np.abs(values[values <= 0]).max()) or float(sizes.min())
            if sizes.max() > 10 * linear:
                ax.set_yscale("symlog", linthresh=linear)
    finish(ax, "KL(mu || pi), nats per token")


def _fan(prefix: str, color: str) -> Callable[[Axes, History], None]:
    """Return a function that draws quantile bands of the importance ratio."""

    def draw(ax: Axes, history: History) -> None:
        steps, table = history.table([f"{prefix}ratio/{name}" for name in _FAN])
        # One token out of millions must not flatten the bands; the summary table shows the extremes.
        bottom, top = (
            max(table[0].min(), table[1].min() / _FAN_REACH),
            min(table[-1].max(), table[-2].max() * _FAN_REACH),
        )
        table, ylabel = _in_units(table)
        lowest, q01, q05, q25, q50, q75, q95, q99, highest = table
        for low, high, alpha, label in (
            (q01, q99, 0.16, "1-99 %"),
            (q05, q95, 0.28, "5-95 %"),
            (q25, q75, 0.5, "25-75 %"),
        ):
            ax.fill_between(steps, low, high, color=color, alpha=alpha, linewidth=0, label=label)
        ax.plot(steps, q50, color=color, label="median")
        ax.plot(steps, highest, color=GRAY, linewidth=0.9, label="min, max")
        ax.plot(steps, lowest, color=GRAY, linewidth=0.9)
        if bottom > 0 and top > 2.5 * bottom:
            ax.set_ylim(bottom / 1.1, top * 1.1)
            log_scale(ax)
        finish(ax, ylabel, legend=False)
        legend_above(ax)

    return draw


def _in_units(ratios: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the values that a plot of ratios shows, and the label of its axis.

    Ratios near 1 are shown as r - 1, in units of a power of 10. The numbers at an axis from 0.9999997 to 1.0000003 are
    all alike, and matplotlib writes their offset into the legend.
    """
    reach = float(np.abs(ratios - 1).max())
    if not 0 < reach < _NEAR_ONE:
        return ratios, "ratio pi / mu"
    power = int(np.floor(np.log10(reach)))
    return (ratios - 1) / 10.0**power, f"pi / mu - 1, in units of 1e{power}"


def _draw_seconds(ax: Axes, history: History) -> None:
    parts = [(name, color) for name, color in _SECONDS if history.has(f"seconds/{name}")]
    keys = [f"seconds/{name}" for name, _ in parts]
    whole = history.has("seconds/total", *keys)
    steps, table = history.table([*keys, "seconds/total"] if whole else keys)
    stack, colors, labels = list(table[: len(keys)]), [color for _, color in parts], [name for name, _ in parts]
    if whole:
        stack.append(np.maximum(table[-1] - table[:-1].sum(axis=0), 0))
        colors, labels = [*colors, GRAY], [*labels, "other"]
    if len(steps) > _BARS:
        stack = [running_mean(height, len(steps) // 30) for height in stack]
    bottom = np.zeros(len(steps))
    for height, color, label in zip(stack, colors, labels, strict=True):
        if len(steps) <= _BARS:
            ax.bar(steps, height, 0.86, bottom=bottom, color=color, label=label, linewidth=0)
        else:
            ax.fill_between(steps, bottom, bottom + height, color=color, label=label, linewidth=0)
        bottom = bottom + height
    ax.grid(visible=False, axis="x")
    finish(ax, "seconds per step", legend=False)
    legend_above(ax)


def _keys(*curves: tuple[str, str, str]) -> tuple[str, ...]:
    return tuple(key for key, _, _ in curves)


_HELD_OUT = (("eval/greedy", "greedy", GREEN), ("eval/sampled", "sampled", BLUE))
_KL = (
    ("kl/k3", "k3", BLUE),
    ("kl/k1", "k1", ORANGE),
    ("mismatch/kl/k3", "k3, engine against trainer", PURPLE),
)
_CLIP = (("clip/high", "above", BLUE), ("clip/low", "below", ORANGE), ("clip/dual", "dual", PURPLE))
_ESS = (("ratio/ess", "all updates", BLUE), ("mismatch/ratio/ess", "engine against trainer", PURPLE))
_SHIFT = (("dp/max", "maximum", ORANGE), ("dp/mean", "mean", BLUE))

PANELS = (
    Panel("reward", "Reward", "Of the trajectories a step trains on.", ("reward/mean", "pass_rate"), _draw_reward),
    Panel("held_out", "Held-out pass rate", "Problems that are never trained on.", _keys(*_HELD_OUT), _draw_held_out),
    Panel(
        "kl",
        "Divergence of trainer and rollout policy",
        "Estimated on the sampled tokens: k1 = mean(log mu/pi), k3 = mean(r - 1 - log r). The dashed curve is the "
        "first update of a step, when both hold the same weights.",
        _keys(*_KL),
        _draw_kl,
    ),
    Panel(
        "ratio",
        "Importance ratio, quantiles over tokens",
        "All updates of a step: staleness and mismatch together.",
        ("ratio/q50",),
        _fan("", BLUE),
    ),
    Panel(
        "mismatch_ratio",
        "Importance ratio at equal weights",
        "First update of a step: what the engine and the trainer make of the same weights.",
        ("mismatch/ratio/q50",),
        _fan("mismatch/", PURPLE),
    ),
    Panel(
        "ess",
        "Effective sample share",
        "(sum r)^2 / (N sum r^2): 1 when all ratios are equal.",
        _keys(*_ESS),
        _curves("share of tokens", *_ESS),
    ),
    Panel(
        "shift",
        "Probability shift",
        "|pi - mu| of the sampled tokens.",
        _keys(*_SHIFT),
        _curves("probability", *_SHIFT, zero=True),
    ),
    Panel(
        "clip",
        "Clipped tokens",
        "Tokens without gradient, by reason.",
        _keys(*_CLIP),
        _curves("share of tokens", *_CLIP, zero=True),
    ),
    Panel(
        "entropy",
        "Entropy",
        "Of the policy on response tokens.",
        ("entropy",),
        _curves("nats per token", ("entropy", "", GREEN)),
    ),
    Panel("loss", "Loss", "Mean over the updates of a step.", ("loss",), _curves("loss", ("loss", "", BLUE))),
    Panel(
        "grad_norm",
        "Gradient norm",
        "Before clipping.",
        ("grad_norm",),
        _curves("L2 norm", ("grad_norm", "", ORANGE), zero=True),
    ),
    Panel(
        "response_length",
        "Response length",
        "Mean over the trajectories of a step.",
        ("response_length/mean",),
        _curves("tokens", ("response_length/mean", "", BLUE), zero=True),
    ),
    Panel(
        "truncated",
        "Truncated responses",
        "Responses that reached rollout.max_new_tokens.",
        ("truncated",),
        _curves("share of responses", ("truncated", "", RED), zero=True),
    ),
    Panel(
        "seconds", "Where the time goes", "Wall clock of a step.", ("seconds/rollout", "seconds/update"), _draw_seconds
    ),
    Panel(
        "throughput",
        "Throughput",
        "Trained tokens over the whole step.",
        ("tokens_per_s",),
        _curves("tokens per second", ("tokens_per_s", "", BLUE), zero=True),
    ),
)

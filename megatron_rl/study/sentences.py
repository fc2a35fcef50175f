"""Sentences of a verdict. Each carries its interval, its number of seeds and the number of configurations tried."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_rl.statistics.estimate import Estimate
from megatron_rl.study.comparison import LEAST_SEEDS, ArmComparison
from megatron_rl.study.stability import Stability
from megatron_rl.study.study_data import StudyData

EQUIVALENT, LOWER, HIGHER, NOT_SHOWN = "equivalent", "lower", "higher", "not shown"
COLLAPSES, STABLE = "collapses", "no collapse"


@dataclass(frozen=True)
class Claim:
    """One sentence about one arm at one size.

    Attributes:
        about: `reward` or `collapse`.
        arm: name of the arm.
        size: name of the size.
        result: equivalent, lower, higher, not shown, collapses or no collapse.
        text: the sentence.
        beside: what stands beside it: the cells that are not done, and how many configurations were tried.
    """

    about: str
    arm: str
    size: str
    result: str
    text: str
    beside: str


def reward_claim(
    data: StudyData,
    key: tuple[str, str],
    compared: ArmComparison | None,
    *,
    p_equal: float | None,
    p_differ: float | None,
) -> Claim:
    """Say whether an arm's reward is equivalent to the reference's, differs from it, or neither was shown.

    Args:
        data: the study.
        key: size and arm.
        compared: the comparison; None if there is none.
        p_equal: p value of TOST, adjusted for all arms; None if it was not made.
        p_differ: p value of no difference, adjusted for all arms; None if it was not made.
    """
    size, arm = key
    alpha, margin = data.record["verdict"]["alpha"], data.record["verdict"]["margin"]
    name, reference = label(arm, size), data.reference
    unit = Unit.of(data)

    def claim(result: str, text: str) -> Claim:
        return Claim("reward", arm, size, result, f"{name}: {text}", _beside(data, key))

    if compared is None:
        return claim(NOT_SHOWN, _why_not_compared(data, key))
    difference, seeds = compared.difference, len(compared.seeds)
    if seeds < LEAST_SEEDS:
        words = "one seed" if seeds == 1 else "two seeds"
        scope = "over prompts alone, " if seeds == 1 else ""
        text = f"not shown: {words} ({unit.interval(difference)} against {reference}, {scope}{words})"
        return claim(NOT_SHOWN, f"{text}; {LEAST_SEEDS} are the least for a claim")
    failed = any(about["status"] == "failed" for about in data.not_done(arm, size).values())
    equal = p_equal is not None and p_equal < alpha and not failed
    differs = p_differ is not None and p_differ < alpha
    direction = LOWER if difference.value < 0 else HIGHER
    words = f"{direction} than {reference} by {unit.amount(abs(difference.value))}"
    if equal and compared.equivalence is not None:
        text = f"equivalent to {reference} within {unit.amount(margin)}"
        text += f" ({unit.interval(compared.equivalence.interval)}, {seeds} seeds"
        text += f"; {words}, which is less than the margin)" if differs else ")"
        return claim(EQUIVALENT, text)
    if differs:
        return claim(direction, f"{words} ({unit.interval(difference)}, {seeds} seeds)")
    if compared.equivalence is None:
        return claim(NOT_SHOWN, f"no difference from {reference} shown ({unit.interval(difference)}, {seeds} seeds)")
    text = f"equivalence to {reference} within {unit.amount(margin)} not shown"
    text += f" ({unit.interval(compared.equivalence.interval)}, {seeds} seeds"
    if failed:
        text += "; an arm with failed cells is not called equivalent"
    elif float(compared.equivalence.p) < alpha:
        text += "; inside the margin alone, not after Holm's correction for all arms"
    elif compared.seeds_needed is not None and compared.seeds_needed > seeds:
        text += f"; equal arms would need about {compared.seeds_needed} seeds"
    return claim(NOT_SHOWN, text + ")")


def collapse_claim(data: StudyData, key: tuple[str, str], found: Stability, p: float | None) -> Claim:
    """Say how many runs of an arm collapsed, and what share of all runs that allows.

    Args:
        data: the study.
        key: size and arm.
        found: collapses of its finished runs.
        p: p value that it collapses as often as the reference, adjusted for all arms; None for the reference.
    """
    size, arm = key
    events, runs = int(np.isfinite(found.collapsed).sum()), len(found.collapsed)
    percent = round(100 * found.share.confidence)
    seeds = "one seed" if runs == 1 else f"{runs} seeds"
    if events == 0:
        bound = f"at most {_percent(found.bound or 0)} of runs, one-sided {percent} % bound, {seeds}"
        text = f"no collapse in {runs} run{'s' * (runs > 1)} ({bound})"
    else:
        steps = np.unique(found.collapsed[np.isfinite(found.collapsed)])
        when = f"at step {steps[0]:.0f}" + (f" to {steps[-1]:.0f}" if len(steps) > 1 else "")
        text = f"{events} of {runs} run{'s' * (runs > 1)} collapsed {when} ({_percent(float(found.share.low))} .. "
        text += f"{_percent(float(found.share.high))} of runs, exact {percent} % interval, {seeds})"
        if p is not None and p < data.record["verdict"]["alpha"]:
            text += f"; a different share than {data.reference} (Fisher's exact test, p = {p:.2g} after Holm)"
    result = COLLAPSES if events else STABLE
    return Claim("collapse", arm, size, result, f"{label(arm, size)}: {text}", _beside(data, key))


def write_notes(data: StudyData) -> list[str]:
    """Return what a reader must know beside the sentences: absent cells, changes of the study, what was not done."""
    notes = []
    own = data.configurations - int(data.record["verdict"].get("tried", 0))
    text = f"{data.configurations} configurations were tried"
    notes.append(f"{text}: {own} in this study, {data.configurations - own} before it, to choose its arms.")
    for status in ("failed", "missing", "stopped", "running"):
        cells = [cell for cell, about in data.not_done().items() if about["status"] == status]
        if cells:
            notes.append(f"{status.capitalize()}: {len(cells)} of {len(data.cells)} cells ({', '.join(cells)}).")
    history = data.record.get("history", [])
    if len(history) > 1:
        rules = sum(a.get("verdict") != b.get("verdict") for a, b in pairwise(history))
        text = f"The study was changed {len(history) - 1} times after it began"
        notes.append(f"{text}; {rules} of these changes are of what the verdict compares.")
    if data.reference is None:
        notes.append("No arm is named as reference (verdict.reference): nothing is compared.")
    elif not data.record["paired"]:
        notes.append("The study is not paired: its arms share no prompts and seeds, so their rewards are not compared.")
    if data.reference is not None and data.record["verdict"]["margin"] is None:
        notes.append("No margin is given (verdict.margin): equivalence is not tested.")
    return notes


@dataclass(frozen=True)
class Unit:
    """How a reward is written: pass rates in points, other rewards as they are."""

    points: bool

    @classmethod
    def of(cls, data: StudyData) -> "Unit":
        """Return the unit of a study: points if all rewards lie in [0, 1]."""
        curves = [curve.reward for group in data.groups.values() for curve in group.curves]
        return cls(all(reward.min() >= 0 and reward.max() <= 1 for reward in curves))

    def number(self, value: float) -> str:
        """Return a reward without its unit."""
        return f"{round(100 * value, 1) + 0.0:.1f}" if self.points else f"{value:.3g}"  # + 0.0: no "-0.0"

    def amount(self, value: float) -> str:
        """Return a reward with its unit."""
        if not self.points:
            return f"{value:.3g}"
        text = f"{100 * value:.1f}".removesuffix(".0")
        return f"{text} point{'' if text == '1' else 's'}"

    def interval(self, estimate: Estimate) -> str:
        """Return an interval in words."""
        if not np.isfinite(estimate.low):
            return "no interval"
        return f"{100 * estimate.confidence:.4g} % interval {self.number(estimate.low)} .. {self.number(estimate.high)}"


def label(arm: str, size: str) -> str:
    """Return the name of an arm at a size."""
    return f"{arm} at {size}" if size else arm


def _why_not_compared(data: StudyData, key: tuple[str, str]) -> str:
    size = key[0]
    if data.reference is None:
        return "not compared: no reference arm is named"
    if key not in data.groups:
        return "not shown: no cell is done"
    if (size, data.reference) not in data.groups:
        return f"not shown: no cell of the reference {data.reference} is done"
    if not data.record["paired"]:
        return "not compared: the study is not paired"
    return f"not shown: no seed is done in both this arm and {data.reference}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _beside(data: StudyData, key: tuple[str, str]) -> str:
    """Return which cells of an arm are not done, and the number of configurations tried."""
    absent = data.not_done(key[1], key[0])
    parts = [f"{data.configurations} configurations tried"]
    for status in dict.fromkeys(about["status"] for about in absent.values()):
        parts.append(f"{status}: {', '.join(cell for cell, about in absent.items() if about['status'] == status)}")
    return "; ".join(parts)

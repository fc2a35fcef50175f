"""The numbers behind each figure of a study's report: rows that are also written as CSV."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.files import replace_file
from megatron_rl.study.stability import MISMATCH, measure_stability, seed_mismatch
from megatron_rl.study.study_data import StudyData

Row = dict[str, Any]
_ENVELOPE = (2, 98)  # percentiles over seeds


def reward_rows(data: StudyData) -> list[Row]:
    """Return the held-out reward at every evaluation: mean, P2 and P98 over seeds."""
    return [
        {"size": size, "arm": arm, "seeds": len(group.curves), "step": int(step), **_spread(values)}
        for (size, arm), group in data.groups.items()
        for step, values in zip(group.steps, group.rewards().T, strict=True)
    ]


def growth_rows(data: StudyData) -> list[Row]:
    """Return the mismatch k3 of every step: geometric mean, P2 and P98 over seeds."""
    rows = []
    for (size, arm), group in data.groups.items():
        steps, values = group.logged(_mismatch_name(data))
        for step, column in zip(steps, values.T, strict=True):
            good = column[np.isfinite(column) & (column > 0)]
            if len(good):
                found = {name: float(np.exp(value)) for name, value in _spread(np.log(good)).items()}
                rows.append({"size": size, "arm": arm, "seeds": len(good), "step": int(step), **found})
    return rows


def run_rows(data: StudyData) -> list[Row]:
    """Return one row a run: its mean mismatch, its last reward and its size."""
    rows = []
    for (size, arm), group in data.groups.items():
        levels, rewards = seed_mismatch(group), group.last().mean(1)
        for seed, level, reward in zip(group.seeds, levels, rewards, strict=True):
            row = {"size": size, "arm": arm, "parameters": group.parameters, "seed": seed, "reward": float(reward)}
            rows.append({**row, "mismatch_k3": float(np.exp(level)) if np.isfinite(level) else ""})
    return rows


def size_rows(verdict: dict[str, Any]) -> list[Row]:
    """Return the mismatch of every arm at every size, with its interval; empty in a study of one size."""
    rows = []
    for arm in verdict["arms"]:
        found = arm["stability"]["mismatch_k3"]
        if found is not None and arm["parameters"] > 0:
            about = {name: arm[name] for name in ("size", "arm", "parameters")}
            rows.append(
                {**about, "seeds": len(arm["seeds"]), **{name: found[name] for name in ("value", "low", "high")}}
            )
    return rows if len({row["parameters"] for row in rows}) > 1 else []


def collapse_rows(data: StudyData, verdict: dict[str, Any]) -> list[Row]:
    """Return the share of runs that have not collapsed, with pointwise intervals, at every step with a change."""
    limit, confidence = data.record["verdict"].get("k3_collapse"), 1 - verdict["alpha"]
    rows = []
    for (size, arm), group in data.groups.items():
        found = measure_stability(group, most_mismatch=limit, confidence=confidence).survival
        about = {"size": size, "arm": arm, "runs": found.runs}
        # Before the first collapse all runs are there; what that says is the exact bound of n runs without an event.
        rows.append(
            {**about, "step": 0.0, "share": 1.0, "low": (verdict["alpha"] / 2) ** (1 / found.runs), "high": 1.0}
        )
        for step, share, low, high in zip(found.times, found.share, found.low, found.high, strict=True):
            rows.append({**about, "step": float(step), "share": float(share), "low": float(low), "high": float(high)})
    return rows


def forest_rows(verdict: dict[str, Any]) -> list[Row]:
    """Return the difference of every arm from the reference, with both intervals and what was concluded."""
    results = {(one["size"], one["arm"]): one["result"] for one in verdict["sentences"] if one["about"] == "reward"}
    rows = []
    for arm in verdict["arms"]:
        found = arm["comparison"]
        if found is None:
            continue
        inner = (found["tost"] or {}).get("interval") or {"low": "", "high": ""}
        rows.append(
            {
                "size": arm["size"],
                "arm": arm["arm"],
                "seeds": len(found["seeds"]),
                "difference": found["difference"]["value"],
                "low": found["difference"]["low"],
                "high": found["difference"]["high"],
                "tost_low": inner["low"],
                "tost_high": inner["high"],
                "result": results[arm["size"], arm["arm"]],
            }
        )
    return rows


def write_csv(rows: list[Row], path: Path) -> None:
    """Write the rows of a figure as CSV. Raises OSError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def _spread(values: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values, _ENVELOPE)
    return {"mean": float(values.mean()), "p02": float(low), "p98": float(high)}


def _mismatch_name(data: StudyData) -> str:
    """Return the column of the mismatch that the runs logged."""
    curves = [curve for group in data.groups.values() for curve in group.curves]
    return next((name for name in MISMATCH if any(np.isfinite(c.column(name)).any() for c in curves)), MISMATCH[0])

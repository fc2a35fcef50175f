"""Results of a study whose truth is known, in the files that `megatron-rl study run` writes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KEY_COLUMNS = (
    *(("cell", pa.string()), ("arm", pa.string()), ("axis.objective", pa.string())),
    *(("size", pa.int64()), ("seed", pa.int64()), ("step", pa.int64())),
)
EVAL_COLUMNS = (
    *(("prompt", pa.int64()), ("samples", pa.int64())),
    *(("reward", pa.float64()), ("variance", pa.float64())),
)
STEP_COLUMNS = tuple(
    (name, pa.float64())
    for name in ("tokens", "seconds", "gpu_seconds", "reward", "mismatch_k3", "max_ratio", "grad_norm", "loss")
)


@dataclass(frozen=True)
class TrueArm:
    """What an arm really does: its last pass rate, the step at half the way, a collapse, and its mismatch."""

    top: float = 0.6
    half_step: float = 20.0
    collapse_at: int | None = None
    k3: float = 1e-3
    seconds: float = 1.0


def simulate_study(
    folder: Path,
    arms: dict[str, TrueArm],
    *,
    sizes: dict[str, int] | None = None,
    seeds: int = 5,
    prompts: int = 60,
    samples: int = 8,
    steps: int = 80,
    seed_sd: float = 0.01,
    absent: dict[str, str] | None = None,
    rng_seed: int = 0,
    **verdict: Any,
) -> Path:
    """Write `results/` of a study and return its folder.

    Args:
        folder: the folder of the study.
        arms: the truth of each arm; the first is the reference.
        sizes: name of each size and its parameters; None for a study of one size.
        seeds: number of seeds.
        prompts: number of held-out prompts.
        samples: samples of each.
        steps: steps of a run, evaluated every tenth of it.
        seed_sd: standard deviation over seeds of the pass rate.
        absent: state of each cell that is not done.
        rng_seed: seed of the simulation.
        **verdict: keys of the section `verdict` of the study.
    """
    rng = np.random.default_rng(rng_seed)
    absent = absent or {}
    hard = rng.normal(0, 0.15, prompts)  # difficulty of the prompts, which all cells share
    at = np.arange(0, steps + 1, max(steps // 10, 1))
    cells: dict[str, dict[str, Any]] = {}
    evals: list[dict[str, Any]] = []
    log: list[dict[str, Any]] = []
    for size, parameters in (sizes or {"": 0}).items():
        for arm, truth in arms.items():
            for seed in range(seeds):
                cell = "-".join(filter(None, (arm, size, f"s{seed}")))
                first = {"cell": cell, "arm": arm, "axis.objective": arm, "size": parameters, "seed": seed}
                state = absent.get(cell, "done")
                cells[cell] = _cell(cell, arm, size, seed, steps, state)
                if state != "done":
                    continue
                luck = rng.normal(0, seed_sd)
                for step in at:
                    rate = np.clip(_rate(truth, float(step)) + luck * min(step / 20, 1) + hard, 0, 1)
                    evals += [{**first, "step": int(step), **row} for row in _eval_rows(rate, samples, rng)]
                log += [{**first, **_log_row(truth, step, rng)} for step in range(steps)]
    results = folder / "results"
    _write_tables(results, evals, log)
    (results / "cells.json").write_text(json.dumps(cells))
    rules = {"reference": next(iter(arms)), "metric": "sampled", "margin": 0.05, "alpha": 0.05, "k3_collapse": None}
    record = {
        "name": "simulated",
        "arms": list(arms),
        "size_axis": "size" if sizes else None,
        "seeds": list(range(seeds)),
        "budget": {"steps": steps, "tokens": None, "seconds": None},
        "paired": True,
        "verdict": {**rules, "tried": 0, **verdict},
        "history": [{"time": 0.0, "digest": "0", "cells": len(cells), "verdict": rules}],
    }
    (results / "study.json").write_text(json.dumps(record))
    return folder


def _eval_rows(rate: np.ndarray, samples: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return a row for each prompt of an evaluation: its mean reward, and the variance of one sample's reward."""
    share = rng.binomial(samples, rate) / samples
    spread = share * (1 - share) * samples / (samples - 1) if samples > 1 else np.full(len(rate), np.nan)
    return [
        {"prompt": i, "samples": samples, "reward": s, "variance": v}
        for i, (s, v) in enumerate(zip(share.tolist(), spread.tolist(), strict=True))
    ]


def _write_tables(results: Path, evals: list[dict[str, Any]], log: list[dict[str, Any]]) -> None:
    results.mkdir(parents=True)
    for name, rows, numbers in (("evals", evals, EVAL_COLUMNS), ("steps", log, STEP_COLUMNS)):
        schema = pa.schema([*KEY_COLUMNS, *numbers])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), results / f"{name}.parquet")


def _cell(cell: str, arm: str, size: str, seed: int, steps: int, state: str) -> dict[str, Any]:
    done = state == "done"
    return {
        **{"cell": cell, "arm": arm, "size": size, "seed": seed, "axes": {"objective": arm}, "digest": "0"},
        **{"status": state, "steps": steps if done else 0, "tokens": 1e3 * steps, "seconds": 1.0 * steps},
        "exit_code": {"done": 0, "failed": 1}.get(state),
        "error": "PrecisionError: the gradient is not finite" if state == "failed" else "",
        "provenance": {"revision": "0123456789abcdef", "versions": {"torch": "2.13.0"}, "device": "CPU", "host": "sim"},
    }


def _rate(truth: TrueArm, step: float) -> float:
    if truth.collapse_at is not None and step >= truth.collapse_at:
        return 0.03
    return 0.3 + (truth.top - 0.3) / (1 + (truth.half_step / max(step, 1e-9)) ** 2)


def _log_row(truth: TrueArm, step: int, rng: np.random.Generator) -> dict[str, Any]:
    tokens = float(rng.uniform(500, 1500))
    seconds = truth.seconds * (0.2 + tokens / 1000) + float(rng.normal(0, 0.01))
    return {
        "step": step,
        "tokens": tokens,
        "seconds": seconds,
        "gpu_seconds": seconds,
        "reward": float(rng.binomial(64, _rate(truth, float(step))) / 64),
        "mismatch_k3": truth.k3 * (1 + step) ** 0.3 * float(np.exp(rng.normal(0, 0.1))),
        "max_ratio": float(1 + rng.exponential(1)),
        "grad_norm": float(rng.exponential(1)),
        "loss": float(rng.normal()),
    }

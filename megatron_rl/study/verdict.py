"""The verdict of a study: numbers with intervals, and the sentences that they carry."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.files import replace_file
from megatron_rl.statistics.equivalence import holm
from megatron_rl.statistics.estimate import Estimate
from megatron_rl.statistics.paired import seed_difference
from megatron_rl.statistics.power_law import LEAST_SIZES, fit_power_law
from megatron_rl.statistics.speedup import SpeedUp
from megatron_rl.statistics.survival import collapse_difference
from megatron_rl.statistics.variance import variance_components
from megatron_rl.study.comparison import (
    ArmComparison,
    CurveComparison,
    as_json,
    compare_arm,
    compare_curves,
    compare_speed,
    compare_step_time,
    fit_group,
)
from megatron_rl.study.sentences import Claim, Unit, collapse_claim, reward_claim, write_notes
from megatron_rl.study.stability import Stability, measure_stability, seed_mismatch
from megatron_rl.study.study_data import ArmRuns, StudyData

UNITS = ("steps", "tokens", "gpu_seconds")
_VERSION = 1  # of the content of verdict.json


def make_verdict(folder: Path) -> dict[str, Any]:
    """Judge a study from its results alone, and write `report/verdict.json` in its folder.

    Args:
        folder: the folder of the study, with `results/`.

    Returns:
        The content of verdict.json: settings, `sentences`, one entry for each size and arm, fits and cells.

    Raises:
        UserError: results are missing or malformed.
    """
    data = StudyData.of(folder)
    settings = data.record["verdict"]
    alpha = float(settings["alpha"])
    stability = {
        key: measure_stability(group, most_mismatch=settings.get("k3_collapse"), confidence=1 - alpha)
        for key, group in data.groups.items()
    }
    compared = _compare(data)
    claims = _reward_claims(data, compared) + _collapse_claims(data, stability)
    verdict = {
        "version": _VERSION,
        "study": data.record["name"],
        "reference": data.reference,
        "metric": settings["metric"],
        "margin": settings["margin"],
        "alpha": alpha,
        "configurations": data.configurations,
        "points": Unit.of(data).points,
        "sentences": [vars(claim) for claim in claims],
        "notes": write_notes(data),
        "arms": [_describe(data, key, stability[key], compared.get(key)) for key in data.groups],
        "variance": {size: _variance(data.at_size(size)) for size in data.sizes},
        "scale": _scale(data),
        "cells": _cells(data),
    }
    verdict = as_json(verdict)
    report = folder / "report"
    report.mkdir(exist_ok=True)
    replace_file(report / "verdict.json", json.dumps(verdict, indent=1, allow_nan=False).encode() + b"\n")
    return verdict


def _compare(data: StudyData) -> dict[tuple[str, str], ArmComparison]:
    """Return the comparison of every arm with the reference of its size."""
    settings, found = data.record["verdict"], {}
    for (size, arm), group in data.groups.items():
        reference = data.groups.get((size, data.reference or ""))
        if reference is None or arm == data.reference or not data.record["paired"]:
            continue
        compared = compare_arm(reference, group, margin=settings["margin"], alpha=settings["alpha"])
        if compared is not None:
            found[size, arm] = compared
    return found


def _reward_claims(data: StudyData, compared: dict[tuple[str, str], ArmComparison]) -> list[Claim]:
    """Return a claim for every arm and size of the study, also where nothing can be compared; Holm over all arms."""
    p_equal = {key: float(one.equivalence.p) for key, one in compared.items() if one.equivalence is not None}
    p_differ = {key: one.p for key, one in compared.items() if one.p is not None}
    equal, differ = (dict(zip(p, holm(np.array(list(p.values()))), strict=True)) for p in (p_equal, p_differ))
    wanted = dict.fromkeys((about.get("size", ""), about["arm"]) for about in data.cells.values())
    return [
        reward_claim(data, key, compared.get(key), p_equal=equal.get(key), p_differ=differ.get(key))
        for key in wanted
        if key[1] != data.reference
    ]


def _collapse_claims(data: StudyData, stability: dict[tuple[str, str], Stability]) -> list[Claim]:
    """Return a claim for every arm: how many of its runs collapsed, and whether the reference differs."""
    p: dict[tuple[str, str], float] = {}
    for (size, arm), found in stability.items():
        reference = stability.get((size, data.reference or ""))
        if reference is not None and arm != data.reference:
            sides = [(int(np.isfinite(one.collapsed).sum()), len(one.collapsed)) for one in (found, reference)]
            p[size, arm] = collapse_difference(sides[0], sides[1])
    adjusted = dict(zip(p, holm(np.array(list(p.values()))), strict=True))
    return [collapse_claim(data, key, found, adjusted.get(key)) for key, found in stability.items()]


def _describe(
    data: StudyData, key: tuple[str, str], stability: Stability, compared: ArmComparison | None
) -> dict[str, Any]:
    """Return all numbers of one arm at one size."""
    group, confidence = data.groups[key], 1 - float(data.record["verdict"]["alpha"])
    reference = data.groups.get((key[0], data.reference or ""))
    other = reference is not None and key[1] != data.reference and data.record["paired"]
    fit = fit_group(group, confidence=confidence)
    found = {
        "arm": group.arm,
        "size": group.size,
        "parameters": group.parameters,
        "seeds": group.seeds,
        "last_step": [int(curve.steps[-1]) for curve in group.curves],
        "reward": seed_difference(group.last().mean(1), confidence=confidence),
        "sigmoid": None
        if fit is None
        else {
            "start": float(fit.start),
            "ceiling": fit.ceiling,
            "midpoint_steps": float(fit.midpoint),
            "steepness": float(fit.steepness),
            "identified": bool(fit.identified),
        },
        "stability": {
            "series": stability.series,
            "collapsed_at": stability.collapsed,
            "share": stability.share,
            "zero_events_bound": stability.bound,
            "mismatch_k3": stability.mismatch,
            "growth": stability.growth,
        },
        "comparison": None if compared is None else _comparison(compared),
    }
    if other and reference is not None:
        curves = compare_curves(reference, group, confidence=confidence)
        found["curves"] = None if curves is None else _curves(curves)
        found["speed_up"] = {
            unit: [_speed_up(one) for one in compare_speed(reference, group, unit, confidence=confidence)]
            for unit in UNITS
        }
        found["break_even_tokens"] = compare_step_time(reference, group, confidence=confidence)
        found["mismatch_ratio"] = _mismatch_ratio(reference, group, confidence)
    return found


def _comparison(one: ArmComparison) -> dict[str, Any]:
    equal = one.equivalence
    return {
        "seeds": one.seeds,
        "prompts": one.prompts,
        "difference": one.difference,
        "difference_for_these_prompts": one.over_seeds,
        "bootstrap": one.bootstrap,
        "seed_sd": one.seed_sd,
        "p_difference": one.p,
        "tost": None if equal is None else {"margin": equal.margin, "p": float(equal.p), "interval": equal.interval},
        "detectable": one.detectable,
        "seeds_for_equivalence": one.seeds_needed,
    }


def _curves(one: CurveComparison) -> dict[str, Any]:
    return {
        "ceiling_difference": one.ceiling,
        "compute_multiplier": None if one.log_multiplier is None else one.log_multiplier.exponential(),
        "identified": one.identified,
        "best_model": ("one curve", "efficiency", "ceiling")[one.best],
        "p_efficiency": one.p_efficiency,
        "p_ceiling": one.p_ceiling,
    }


def _speed_up(one: SpeedUp) -> dict[str, Any]:
    return {"share": one.share, "level": one.level, "ratio": one.ratio}


def _mismatch_ratio(reference: ArmRuns, group: ArmRuns, confidence: float) -> Estimate | None:
    """Return how many times larger the mismatch of an arm is, over the seeds that both have."""
    seeds = [seed for seed in reference.seeds if seed in group.seeds]
    if not seeds:
        return None
    ratios = seed_mismatch(group.of(seeds)) - seed_mismatch(reference.of(seeds))
    return seed_difference(ratios, confidence=confidence).exponential() if np.isfinite(ratios).all() else None


def _variance(groups: dict[str, ArmRuns]) -> dict[str, float] | None:
    """Return shares of the variance of the last rewards over the seeds that all arms have; None with too few."""
    seeds = sorted(set.intersection(*(set(group.seeds) for group in groups.values())))
    if len(groups) < 2 or len(seeds) < 2:
        return None
    rewards = np.stack([group.of(seeds).last() for group in groups.values()])
    chance = np.stack([group.of(seeds).last_chance() for group in groups.values()])
    if rewards.shape[-1] < 2:
        return None
    found = variance_components(rewards, sampling=float(chance.mean())).shares()
    return {name: float(share) for name, share in found.items()}


def _scale(data: StudyData) -> dict[str, Any]:
    """Return the power law of mismatch against size of each arm, or why there is none."""
    found: dict[str, Any] = {}
    for arm in data.record["arms"]:
        groups = [group for (_, one), group in data.groups.items() if one == arm]
        points = [(g.parameters, float(np.exp(level))) for g in groups for level in seed_mismatch(g)]
        points = [point for point in points if point[0] > 0 and np.isfinite(point[1])]
        sizes = len({size for size, _ in points})
        if sizes < LEAST_SIZES:
            found[arm] = {"refused": f"{sizes} sizes: a power law needs {LEAST_SIZES}"}
            continue
        x, y = np.array(points).T
        law = fit_power_law(x, y, confidence=1 - float(data.record["verdict"]["alpha"]))
        found[arm] = {
            "exponent": law.exponent,
            "limit": float(law.limit),
            "factor": float(law.factor),
            "p": float(law.p),
            "hold_out_error": float(law.hold_out),
            "hold_out_error_of_mean": float(law.hold_out_constant),
        }
    return found


def _cells(data: StudyData) -> list[dict[str, Any]]:
    keys = ("arm", "size", "seed", "status", "steps", "tokens", "seconds", "exit_code", "error", "provenance")
    return [{"cell": cell, **{key: about.get(key) for key in keys}} for cell, about in data.cells.items()]

"""The numbers of one arm against the reference at one size."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.statistics.bootstrap import seed_prompt_bootstrap
from megatron_rl.statistics.equivalence import (
    Equivalence,
    detectable_seed_difference,
    difference_p,
    seeds_for_equivalence,
    tost,
)
from megatron_rl.statistics.estimate import Estimate
from megatron_rl.statistics.nested import nested_fits
from megatron_rl.statistics.paired import crossed_difference, prompt_difference, seed_difference
from megatron_rl.statistics.sigmoid import SigmoidFit, fit_sigmoid
from megatron_rl.statistics.speedup import SpeedUp, break_even, speed_up
from megatron_rl.statistics.variance import seed_sd
from megatron_rl.study.study_data import ArmRuns

LEAST_SEEDS = 3  # below this number of seeds nothing is claimed
SHARES = (0.5, 0.8, 0.95)
_LEAST_CURVE = 5  # evaluations after step 0 that a fit needs
_SEED = 0  # of the bootstrap: a report of the same tables has the same numbers


@dataclass(frozen=True)
class ArmComparison:
    """An arm minus the reference, with the same seeds and prompts.

    Attributes:
        arm: name of the arm.
        size: name of the size.
        seeds: seeds that are done in both.
        prompts: number of held-out prompts.
        difference: of the reward at the last evaluation; over prompts alone if there is one seed.
        over_seeds: t on seed means, for these prompts only; None with one seed.
        bootstrap: seeds, then prompts; None with one seed.
        seed_sd: standard deviation over seeds of the difference; None with one seed.
        equivalence: TOST at the study's margin; None without a margin or below three seeds.
        p: p value of no difference; None below three seeds.
        detectable: difference that this number of seeds finds with 80 %; None with one seed.
        seeds_needed: seeds that would show equivalence of equal arms with 80 %; None without a margin or one seed.
    """

    arm: str
    size: str
    seeds: list[int]
    prompts: int
    difference: Estimate
    over_seeds: Estimate | None = None
    bootstrap: Estimate | None = None
    seed_sd: Estimate | None = None
    equivalence: Equivalence | None = None
    p: float | None = None
    detectable: float | None = None
    seeds_needed: int | None = None


def compare_arm(reference: ArmRuns, arm: ArmRuns, *, margin: float | None, alpha: float) -> ArmComparison | None:
    """Compare the last evaluations of an arm with those of the reference; None if they have no seed in common.

    Args:
        reference: finished cells of the reference.
        arm: finished cells of the arm, at the same size.
        margin: largest difference that counts as equal, in reward; None for no test of it.
        alpha: error rate of intervals and tests.
    """
    seeds = [seed for seed in reference.seeds if seed in arm.seeds]
    if not seeds:
        return None
    delta = arm.of(seeds).last() - reference.of(seeds).last()
    confidence, prompts = 1 - alpha, delta.shape[1]
    if len(seeds) == 1:
        alone = prompt_difference(arm.of(seeds).last()[0], reference.of(seeds).last()[0], confidence=confidence)
        return ArmComparison(arm.arm, arm.size, seeds, prompts, alone)
    difference = crossed_difference(delta, confidence=confidence)
    means = delta.mean(1)
    spread = seed_sd(means, confidence=confidence)
    claims = len(seeds) >= LEAST_SEEDS
    return ArmComparison(
        arm.arm,
        arm.size,
        seeds,
        prompts,
        difference,
        over_seeds=seed_difference(means, confidence=confidence),
        bootstrap=seed_prompt_bootstrap(delta, np.random.default_rng(_SEED), confidence=confidence),
        seed_sd=spread,
        equivalence=tost(difference, margin, alpha=alpha) if margin is not None and claims else None,
        p=float(difference_p(difference)) if claims else None,
        detectable=detectable_seed_difference(float(spread.value), len(seeds), confidence=confidence),
        seeds_needed=None if margin is None else seeds_for_equivalence(float(spread.value), margin, alpha=alpha),
    )


@dataclass(frozen=True)
class CurveComparison:
    """How the curves of two arms differ: where they end, or how fast they get there.

    Attributes:
        ceiling: A of the arm minus that of the reference, by t over the seeds' own fits; None if not identified.
        log_multiplier: ln(C_mid of the reference / C_mid of the arm), in the same way.
        identified: share of the seeds' fits, of both arms, whose ceiling is identified.
        best: number of the best nested model of the mean curves by AICc.
        p_efficiency: F test of own midpoints against one curve.
        p_ceiling: F test of own ceilings against own midpoints.
    """

    ceiling: Estimate | None
    log_multiplier: Estimate | None
    identified: float
    best: int
    p_efficiency: float
    p_ceiling: float


def fit_group(group: ArmRuns, *, confidence: float) -> SigmoidFit | None:
    """Fit the mean reward curve of a group against steps; None with fewer than five evaluations after step 0."""
    steps, rewards = group.steps, group.rewards()
    after = steps > 0
    if after.sum() < _LEAST_CURVE or after.all():
        return None
    return fit_sigmoid(
        steps[after],
        rewards.mean(0)[after],
        float(rewards[:, ~after].mean()),
        confidence=confidence,
        most=_top(rewards),
    )


def compare_curves(reference: ArmRuns, arm: ArmRuns, *, confidence: float) -> CurveComparison | None:
    """Fit the curves of both arms and compare them; None with too few seeds, or evaluations, in common.

    Args:
        reference: finished cells of the reference.
        arm: finished cells of the arm.
        confidence: of the intervals.
    """
    pair = _paired(reference, arm)
    if pair is None or len(pair[0].seeds) < LEAST_SEEDS:
        return None
    steps, both = _common_curves(*pair)
    after = steps > 0
    if after.sum() < _LEAST_CURVE or after.all():
        return None
    start, curves = both[..., ~after].mean(-1), both[..., after]
    top = _top(both)
    nested = nested_fits(steps[after], curves.mean(1), start.mean(1), most=top)
    fits = fit_sigmoid(steps[after], curves, start, confidence=confidence, most=top)
    known = bool(np.all(fits.identified))
    ceiling = seed_difference(fits.ceiling.value[1] - fits.ceiling.value[0], confidence=confidence)
    ratio = seed_difference(np.log(fits.midpoint[0]) - np.log(fits.midpoint[1]), confidence=confidence)
    return CurveComparison(
        ceiling if known else None,
        ratio if known else None,
        float(np.mean(fits.identified)),
        int(nested.best),
        float(nested.p_efficiency),
        float(nested.p_ceiling),
    )


def compare_speed(reference: ArmRuns, arm: ArmRuns, unit: str, *, confidence: float) -> list[SpeedUp]:
    """Return the speed-up of an arm to 50, 80 and 95 % of the common rewards; empty with no seed in common.

    Args:
        reference: finished cells of the reference.
        arm: finished cells of the arm.
        unit: of compute: steps, tokens, seconds, gpu_seconds.
        confidence: of the intervals.
    """
    pair = _paired(reference, arm)
    if pair is None or any(len(group.steps) < 2 for group in pair):
        return []
    sides = [(group.compute(unit), group.rewards()) for group in pair]
    if not all(np.isfinite(compute).all() for compute, _ in sides):
        return []
    return [speed_up(sides[0], sides[1], share=share, confidence=confidence) for share in SHARES]


def compare_step_time(reference: ArmRuns, arm: ArmRuns, *, confidence: float) -> Estimate | None:
    """Return the tokens a step from which the arm's steps are faster; None if steps are too alike to tell.

    Args:
        reference: finished cells of the reference.
        arm: finished cells of the arm.
        confidence: of the interval.
    """
    sides = []
    for group in (reference, arm):
        tokens, seconds = (np.concatenate([c.column(name)[1:] for c in group.curves]) for name in ("tokens", "seconds"))
        good = np.isfinite(tokens) & np.isfinite(seconds)
        sides.append((tokens[good], seconds[good]))
    if any(len(tokens) < 10 or np.ptp(tokens) == 0 for tokens, _ in sides):
        return None
    found = break_even((sides[0][0], sides[1][0]), (sides[0][1], sides[1][1]), confidence=confidence)
    return found if np.isfinite(found.low) and found.high > 0 else None


def _top(rewards: np.ndarray) -> float:
    """Return the largest reward there can be: 1 for pass rates, else twice the range above what was seen."""
    return 1.0 if rewards.max() <= 1 else float(rewards.max() + 2 * np.ptp(rewards))


def _paired(reference: ArmRuns, arm: ArmRuns) -> tuple[ArmRuns, ArmRuns] | None:
    seeds = [seed for seed in reference.seeds if seed in arm.seeds]
    return (reference.of(seeds), arm.of(seeds)) if seeds else None


def _common_curves(reference: ArmRuns, arm: ArmRuns) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which both were evaluated, [n], and their rewards, [2, seeds, n]."""
    steps = np.intersect1d(reference.steps, arm.steps)
    return steps, np.stack([group.rewards()[:, np.isin(group.steps, steps)] for group in (reference, arm)])


def as_json(value: Any) -> Any:
    """Return a result as JSON data; what is infinite or not a number becomes null."""
    if isinstance(value, Estimate):
        names = ("value", "se", "low", "high", "df", "confidence", "method")
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value

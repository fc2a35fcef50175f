"""`study compare`: the paired difference of two finished cells, or of two studies cell by cell, with its interval."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_rl.diagnostics.evaluations import EVALUATIONS_NAME, Evaluation, read_evaluations
from megatron_rl.errors import ConfigError, UserError, did_you_mean, shorten
from megatron_rl.statistics.estimate import Estimate
from megatron_rl.statistics.paired import crossed_difference, prompt_difference
from megatron_rl.study.cell_status import DONE, read_states
from megatron_rl.study.grid import RUNS
from megatron_rl.study.results import counted_evaluations
from megatron_rl.study.study_data import StudyData
from megatron_rl.study.study_folder import StudyFolder
from megatron_rl.trainer.run_control import RunControl

METRICS = ("sampled", "greedy")


def compare_results(a: Path, b: Path, metric: str, confidence: float) -> str:
    """Return A minus B in words, a line for each pair.

    Args:
        a: the run folder of a finished cell, or the folder of a study.
        b: the same; it is subtracted.
        metric: held-out reward, sampled or greedy; studies have their own.
        confidence: of the interval.

    Raises:
        ConfigError: the metric is unknown.
        UserError: A and B are no two cells or two studies, are not done, or answered different prompts.
    """
    if metric not in METRICS:
        raise ConfigError(f"--metric is '{shorten(metric)}'; {did_you_mean(metric, METRICS)}")
    kinds = [_kind(path) for path in (a, b)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{a} is a {kinds[0]} and {b} is a {kinds[1]}: compare two cells, or two studies")
    lines = _study_lines(a, b, confidence) if kinds[0] == "study" else _cell_lines(a, b, metric, confidence)
    return "\n".join(lines)


def _kind(path: Path) -> str:
    if (path / EVALUATIONS_NAME).is_file():
        return "cell"
    if (path / "study.json").is_file() or (path / "results" / "study.json").is_file():
        return "study"
    raise UserError(f"{path} is neither the run folder of a cell, with {EVALUATIONS_NAME}, nor the folder of a study")


def _cell_lines(a: Path, b: Path, metric: str, confidence: float) -> Iterator[str]:
    first, second = _last_evaluation(a), _last_evaluation(b)
    if first.prompts != second.prompts:
        raise UserError(
            f"{a} and {b} answered different held-out prompts: their rewards cannot be paired. Give both runs the same "
            "task and eval sections, and the same run.seed or task.split_seed"
        )
    rewards = [_rewards(evaluation, metric) for evaluation in (first, second)]
    found = prompt_difference(rewards[0], rewards[1], confidence=confidence)
    yield f"{a.name} (step {first.step}) minus {b.name} (step {second.step}), {metric} held-out reward: " + words(found)
    yield f"over {len(first.prompts)} prompts, for these two runs: it says nothing about other seeds"


def _last_evaluation(run: Path) -> Evaluation:
    study = StudyFolder(run.absolute().parent.parent)
    if run.absolute().parent.name == RUNS and (study.folder / "study.json").is_file():
        found = _of_study(study, run.absolute().name)
    elif RunControl(run).done_steps() is None:
        raise UserError(f"{run} is not done: it has no control/done.json")
    else:
        found = read_evaluations(run)
    if not found:
        raise UserError(f"{run} has no evaluation: set eval.prompts")
    return found[-1]


def _of_study(study: StudyFolder, cell: str) -> list[Evaluation]:
    """Return the evaluations of a cell that its study counts. A budget may have ended the run before its last step."""
    record = study.record()
    state = next((one for one in read_states(study, record) if one.cell == cell), None)
    if state is None:
        raise UserError(f"{study.run(cell)} is no cell of its study; {did_you_mean(cell, record['cells'])}")
    if state.status != DONE:
        raise UserError(f"{study.run(cell)} is not done: it is {state.status} after {state.steps} steps")
    return counted_evaluations(study.run(cell), record["budget"])


def _rewards(evaluation: Evaluation, metric: str) -> np.ndarray:
    """Return the mean reward of each prompt, [prompts]."""
    return np.array(evaluation.greedy if metric == "greedy" else [np.mean(one) for one in evaluation.sampled])


def _study_lines(a: Path, b: Path, confidence: float) -> Iterator[str]:
    first, second = StudyData.of(a), StudyData.of(b)
    metrics = [data.record["verdict"]["metric"] for data in (first, second)]
    if metrics[0] != metrics[1]:
        raise UserError(f"{a} has the metric {metrics[0]} and {b} has {metrics[1]}: they cannot be compared")
    shared = [key for key in first.groups if key in second.groups]
    if not shared:
        raise UserError(f"{a} and {b} have no arm with finished cells in common")
    for key in shared:
        size, arm = key
        ours, theirs = first.groups[key], second.groups[key]
        seeds = [seed for seed in ours.seeds if seed in theirs.seeds]
        name = f"{arm}, {size}" if size else arm
        if not seeds:
            yield f"{name}: no seed is done in both"
            continue
        if not np.array_equal(ours.curves[0].prompts, theirs.curves[0].prompts):
            raise UserError(f"{name}: {a} and {b} answered different numbers of prompts: they cannot be paired")
        delta = ours.of(seeds).last() - theirs.of(seeds).last()
        if len(seeds) == 1:
            found = prompt_difference(delta[0], np.zeros_like(delta[0]), confidence=confidence)
        else:
            found = crossed_difference(delta, confidence=confidence)
        count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        yield f"{name}: {words(found)} ({count}, {delta.shape[1]} prompts)"


def words(found: Estimate) -> str:
    """Return an estimate with its interval as text."""
    share = f"{100 * found.confidence:g} %"
    return f"{found.value:+.4f} ({share} interval {found.low:+.4f} .. {found.high:+.4f})"

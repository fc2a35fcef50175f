"""Two finished cells are compared prompt by prompt, two studies also seed by seed."""

import numpy as np
import pytest

from megatron_rl.diagnostics.evaluations import Evaluation, EvaluationLog
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.study.compare_cells import compare_results
from megatron_rl.study.results import collect_results
from megatron_rl.trainer.run_control import RunControl
from tests.unit.study.studies import written
from tests.unit.study.test_results import make_run


def make_cell(run, rewards, prompts="abcd", *, done=True):
    run.mkdir()
    EvaluationLog(run).append(Evaluation(3, list(prompts), [1.0] * len(rewards), [[one] for one in rewards]))
    if done:
        RunControl(run).write_done(3)
    return run


def test_cells_are_paired_by_prompt(tmp_path):
    """By hand: differences 0.5, 0.5, 0.5, 0.1; mean 0.4; s = 0.2; t(3) = 3.1824; half width 3.1824 x 0.2 / 2."""
    a, b = make_cell(tmp_path / "a", [1.0, 0.5, 0.7, 0.1]), make_cell(tmp_path / "b", [0.5, 0.0, 0.2, 0.0])
    text = compare_results(a, b, "sampled", 0.95)
    assert "a (step 3) minus b (step 3), sampled held-out reward: +0.4000 (95 % interval +0.0818 .. +0.7182)" in text
    assert "over 4 prompts" in text and "nothing about other seeds" in text
    assert "+0.0000" in compare_results(a, b, "greedy", 0.95)


def test_studies_are_paired_by_arm_and_seed(tmp_path):
    folders = []
    for name, low in (("one", 0.5), ("two", 0.25)):
        (tmp_path / name).mkdir()
        folder = written(tmp_path / name, seeds=[0, 1], axes={"arm": {"grpo": {"objective.name": "grpo"}}})
        for seed in (0, 1):
            make_run(folder, f"grpo-s{seed}", 3, done=False)
            EvaluationLog(folder.run(f"grpo-s{seed}")).append(
                Evaluation(3, ["p", "q"], [1.0, 1.0], [[low + seed * np.sign(low - 0.3) * 0.1] * 4, [0.5] * 4])
            )
            RunControl(folder.run(f"grpo-s{seed}")).write_done(3)
        collect_results(folder)
        folders.append(folder.folder)
    text = compare_results(*folders, "sampled", 0.9)
    assert text.startswith("grpo: +0.1750 (90 % interval") and text.endswith("(2 seeds, 2 prompts)")


def test_a_cell_that_its_budget_ended_is_compared_where_the_budget_ends(tmp_path):
    folder = written(tmp_path, axes={}, seeds=[0, 1, 2], budget={"steps": 100, "tokens": 25})
    for seed, steps in ((0, 5), (1, 4), (2, 1)):
        make_run(folder, f"all-s{seed}", steps, done=False)  # 10 tokens a step
    text = compare_results(folder.run("all-s0"), folder.run("all-s1"), "sampled", 0.95)
    assert "all-s0 (step 2) minus all-s1 (step 2)" in text
    with pytest.raises(UserError, match=r"all-s2 is not done: it is stopped after 1 steps"):
        compare_results(folder.run("all-s0"), folder.run("all-s2"), "sampled", 0.95)


def test_what_cannot_be_paired_is_refused(tmp_path):
    a = make_cell(tmp_path / "a", [1.0, 0.5])
    others = make_cell(tmp_path / "b", [1.0, 0.5], prompts="xy")
    begun = make_cell(tmp_path / "c", [1.0, 0.5], done=False)
    with pytest.raises(UserError, match="answered different held-out prompts"):
        compare_results(a, others, "sampled", 0.95)
    with pytest.raises(UserError, match="is not done"):
        compare_results(a, begun, "sampled", 0.95)
    with pytest.raises(UserError, match="neither the run folder of a cell"):
        compare_results(a, tmp_path, "sampled", 0.95)
    with pytest.raises(UserError, match=r"is a cell and .* is a study"):
        compare_results(a, written(tmp_path).folder, "sampled", 0.95)
    with pytest.raises(ConfigError, match="did you mean 'greedy'"):
        compare_results(a, a, "greed", 0.95)

"""Evaluations are on disk once, prompt by prompt, also after a resume."""

import pytest

from megatron_rl.diagnostics.evaluations import Evaluation, EvaluationLog, read_evaluations


def evaluation(step: int, greedy: float = 1.0) -> Evaluation:
    return Evaluation(step, ["a", "b"], [greedy, 0.0], [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])


def test_the_rates_are_means_over_prompts_and_samples():
    assert evaluation(0).rates == {"eval/greedy": 0.5, "eval/sampled": pytest.approx(0.5)}


def test_a_resume_keeps_the_evaluation_of_the_weights_that_it_starts_from(tmp_path):
    for step in (0, 2, 4):
        EvaluationLog(tmp_path).append(evaluation(step))
    EvaluationLog(tmp_path, resume_from=2).append(evaluation(4, greedy=0.0))
    assert read_evaluations(tmp_path) == [evaluation(0), evaluation(2), evaluation(4, greedy=0.0)]
    assert len((tmp_path / "evaluations.dropped.jsonl").read_text().splitlines()) == 1


def test_a_run_that_starts_again_evaluates_again(tmp_path):
    EvaluationLog(tmp_path).append(evaluation(0))
    EvaluationLog(tmp_path, resume_from=0)
    assert read_evaluations(tmp_path) == []

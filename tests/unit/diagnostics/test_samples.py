"""Samples of a step are on disk once, also after a resume."""

import pytest

from megatron_rl.config import make_config
from megatron_rl.diagnostics.samples import SampleLog, ShownSample, read_shown_samples
from megatron_rl.errors import ConfigError, UserError


def row(step: int, text: str = "2") -> ShownSample:
    return ShownSample(step, 10 * step, "p", "1+1=", text, 1.0, 1, "stop", 0.25)


def test_samples_come_back_as_they_were_written_whatever_the_text(tmp_path):
    rows = [row(0, "a\nb\u2028\x00 \N{SNOWMAN} \ud800"), row(0)]
    SampleLog(tmp_path).append(rows)
    assert read_shown_samples(tmp_path) == rows


def test_a_resume_moves_the_samples_of_the_steps_that_run_again(tmp_path):
    for step in range(4):
        SampleLog(tmp_path).append([row(step)])
    SampleLog(tmp_path, resume_from=2).append([row(2, "again")])
    assert [(one.step, one.response) for one in read_shown_samples(tmp_path)] == [(0, "2"), (1, "2"), (2, "again")]
    assert len((tmp_path / "samples.dropped.jsonl").read_text().splitlines()) == 2


def test_a_torn_last_line_is_set_aside(tmp_path):
    SampleLog(tmp_path).append([row(0)])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 1, "tra')
    SampleLog(tmp_path, resume_from=1).append([row(1)])
    assert [one.step for one in read_shown_samples(tmp_path)] == [0, 1]


def test_a_run_without_samples_makes_no_file(tmp_path):
    SampleLog(tmp_path, resume_from=3).append([])
    assert not list(tmp_path.iterdir()) and read_shown_samples(tmp_path) == []


def test_a_malformed_line_is_refused_by_file_and_line(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": "x"}\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl:1: a JSON object with an integer 'step'"):
        read_shown_samples(tmp_path)


def test_a_step_cannot_show_more_prompts_than_it_has():
    sections = {"model": {"path": "m"}, "rollout": {"prompts_per_step": 8}}
    make_config({**sections, "run": {"show_samples": 8}})
    with pytest.raises(ConfigError, match=r"run\.show_samples: 9 exceeds rollout\.prompts_per_step: 8"):
        make_config({**sections, "run": {"show_samples": 9}})

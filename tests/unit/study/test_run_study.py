"""What `study run` refuses before it looks at a cell, and a second array beside one that Slurm still has."""

import json
from pathlib import Path

import pytest
import torch

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.launch.conductor import slurm_commands
from megatron_rl.study.run_study import StudyRequest, run_study
from megatron_rl.study.study_array import submit_cells
from tests.unit.study.studies import written


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"slurm": True}, "--slurm and --profile go together"),
        ({"profile": "p"}, "--slurm and --profile go together"),
        ({"settings": ["a=b"]}, "--set is about a profile"),
        ({"slurm": True, "profile": "p", "workers": 2}, "--workers, --gpus-per-worker are about this machine"),
        ({"slurm": True, "profile": "p", "gpus_per_worker": 1}, "--workers, --gpus-per-worker are about this machine"),
        ({"slurm": True, "profile": "p", "attempts": 2}, "--attempts is about this machine: .*--set requeue.max=1"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(asked, words):
    with pytest.raises(ConfigError, match=words):
        run_study(StudyRequest(Path("none.yaml"), **asked))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpus_for_workers_are_refused_where_there_are_none():
    with pytest.raises(ConfigError, match="--gpus-per-worker 2: torch sees no GPU here"):
        run_study(StudyRequest(Path("none.yaml"), gpus_per_worker=2))


def test_a_second_array_is_refused_while_slurm_has_the_first(tmp_path, monkeypatch):
    folder = written(tmp_path)
    (folder.runs / "launch").mkdir()
    (folder.runs / "launch" / "submit.json").write_text(json.dumps({"jobs": ["77"]}))
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho PENDING\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")
    with pytest.raises(UserError, match=r"array 77 of this study waits or runs: .* scancel 77"):
        submit_cells(folder, ["grpo-s0"], "p", (), dry_run=False)
    squeue.write_text("#!/bin/sh\nexit 1\n")
    (squeue.parent / "sinfo").symlink_to("squeue")
    monkeypatch.setattr(slurm_commands.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="Slurm does not say whether array 77 of this study has ended"):
        submit_cells(folder, ["grpo-s0"], "p", (), dry_run=False)
    assert not (folder.folder / "array").exists()

"""The mismatch attributed inside a run and of its folder afterwards, on the real command line."""

import json

import pytest

from megatron_rl.diagnostics.attribution import SOURCES
from tests.e2e.command import records


def test_a_run_attributes_its_mismatch_and_the_command_does_so_again_without_touching_the_run(cli, small_run, run_folder):
    settings = ["precision.train=bf16", "precision.rollout=fp8_blockwise", "precision.rollout_activations=fp8"]
    result = cli("train", small_run, "parallel.tensor=2", "run.attribute_every=2", *settings)
    assert result.code == 0, result.all
    (inside,) = records(run_folder, "attribution")
    assert (inside["step"], inside["version"]) == (2, 2), "after two steps, of the weights that sampled the second"
    assert inside["attribution/staleness/rms"] > 0 and inside["attribution/weight/rms"] > 0
    assert inside["attribution/sync/rms"] == inside["attribution/sync/tensors"] == 0
    assert sum(inside[f"attribution/{name}/share"] for name in SOURCES) == pytest.approx(1)
    assert "seconds/attribution" in records(run_folder)[1] and "mismatch after 2 steps" in result.out
    before = (run_folder / "log.jsonl").read_text()

    result = cli("attribute", run_folder, "--prompts", 4, "--sampled-by", 1)
    assert result.code == 0, result.all
    assert all(name in result.out for name in SOURCES) and "sync is whole" in result.out
    log = (run_folder / "log.jsonl").read_text()
    assert log.startswith(before)
    again = json.loads(log[len(before) :])
    assert (again["kind"], again["step"]) == ("attribution", 2) and again["attribution/staleness/rms"] > 0
    assert not (run_folder / "attribution").exists()
    refused = cli("attribute", run_folder, "--layers")
    assert refused.code == 2 and "hidden states are compared on one rank" in refused.err, refused.all

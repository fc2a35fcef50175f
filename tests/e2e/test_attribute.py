"""The real command line attributes the mismatch inside a run, and afterwards from the run folder."""

import json

import pytest

from megatron_rl.diagnostics.score_chain import SOURCES
from tests.e2e.command import assert_declared, assert_refused, records


def test_a_run_attributes_its_mismatch_and_the_command_does_so_again_without_touching_the_run(
    cli, small_run, run_folder
):
    settings = ["precision.train=bf16", "precision.rollout=fp8_blockwise", "precision.rollout_activations=fp8"]
    result = cli("train", small_run, "run.attribute_every=2", "rollout.samples_per_prompt=4", *settings)
    assert result.code == 0, result.all
    assert_declared(run_folder)
    (inside,) = records(run_folder, "attribution")
    assert (inside["step"], inside["sampled_by"]) == (2, 1), "after two steps, of the weights that sampled the second"
    assert inside["attribution/staleness/rms"] > 0 and inside["attribution/weight/rms"] > 0
    assert inside["attribution/sync/rms"] == inside["attribution/sync/tensors"] == 0
    assert sum(inside[f"attribution/{name}/share"] for name in SOURCES) == pytest.approx(1)
    assert "seconds/attribution" in records(run_folder)[1] and "mismatch after 2 steps" in result.out
    before = (run_folder / "log.jsonl").read_text()

    result = cli("attribute", run_folder, "--prompts", 4, "--sampled-by", 1)
    assert result.code == 0, result.all
    assert "fp8_blockwise" in result.out or "fp8_128x128" in result.out, (
        "the plan is said, whatever command computes by it"
    )
    assert "sampled by the weights of step 1" in " ".join(result.out.split()) and "sync is whole" in result.out
    assert all(name in result.out for name in SOURCES)
    log = (run_folder / "log.jsonl").read_text()
    assert log.startswith(before)
    again = json.loads(log[len(before) :])
    assert (again["kind"], again["step"], again["sampled_by"]) == ("attribution", 2, 1)
    assert again["attribution/staleness/rms"] > 0 and not (run_folder / "attribution").exists()


def test_hidden_states_are_not_compared_over_several_ranks(refused, small_run, run_folder):
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text(small_run.read_text().replace("tensor: 1", "tensor: 2"))
    assert_refused(
        refused("attribute", run_folder, "--layers"), "ConfigError", "hidden states are compared on one rank"
    )


def test_a_folder_without_a_run_is_not_attributed(refused, tmp_path):
    assert_refused(refused("attribute", tmp_path), "UserError", f"{tmp_path} is not the folder of a run")

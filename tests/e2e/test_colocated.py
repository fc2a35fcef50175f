"""A run whose trainer and engines take turns trains as one that holds everything at once."""

import shutil

from tests.e2e.command import records
from tests.e2e.test_resume import untimed


def test_a_colocated_run_and_its_checkpoints_are_those_of_another_bit_for_bit(cli, small_run, run_folder, tmp_path):
    fixed = ["rollout.deterministic=true", "run.save_every=2", "run.steps=4"]
    result = cli("train", small_run, *fixed)
    assert result.code == 0, result.all
    shutil.move(run_folder, tmp_path / "straight")
    shared = [*fixed, "rollout.colocate=true"]
    result = cli("train", small_run, *shared)
    assert result.code == 0, result.all
    assert "colocation: rank 0 frees" in result.out
    expected = [untimed(r) for r in records(tmp_path / "straight")]
    assert [untimed(r) for r in records(run_folder)] == expected
    # The checkpoint of step 2 was made at the trainer's next turn.
    shutil.rmtree(run_folder / "checkpoints" / "step_000004")
    shutil.rmtree(run_folder / "hf")
    result = cli("train", small_run, *shared, "--resume")
    assert result.code == 0, result.all
    assert [untimed(r) for r in records(run_folder)] == expected

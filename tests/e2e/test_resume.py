"""A run that was stopped goes on as if it had not been: after its end, after Ctrl-C, after a kill."""

from safetensors.torch import load_file

from megatron_rl.policy.checkpoint import newest_valid
from tests.e2e.command import records

TIMES = ("seconds/", "tokens_per_s")


def untimed(record):
    return {key: value for key, value in record.items() if not key.startswith(TIMES)}


def test_three_steps_and_three_more_are_six_steps_bit_for_bit(cli, small_run, tmp_path):
    fixed = ["rollout.deterministic=true", "optimizer.warmup_updates=8"]
    for arguments in (["run.steps=6", "run.name=straight"], ["run.steps=3", "run.name=parts"]):
        result = cli("train", small_run, *fixed, *arguments)
        assert result.code == 0, result.all
    result = cli("train", "--resume", small_run, *fixed, "run.steps=6", "run.name=parts")
    assert result.code == 0, result.all
    straight, parts = tmp_path / "runs" / "straight", tmp_path / "runs" / "parts"
    assert [untimed(r) for r in records(parts)] == [untimed(r) for r in records(straight)]
    assert [(r["step"], r["version"]) for r in records(parts)] == [(step, step + 1) for step in range(6)]
    assert any(r["grad_norm"] > 0 for r in records(parts)[3:]), "with no reward at all nothing would be compared"
    ours, theirs = (load_file(run / "hf" / "model.safetensors") for run in (parts, straight))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_ctrl_c_saves_the_last_whole_step_and_the_run_goes_on(start, cli, small_run, run_folder):
    command = start("train", small_run, "run.steps=500", "run.save_every=100", "parallel.tensor=2", "rollout.servers=2")
    command.until(lambda: len(records(run_folder)) >= 2)
    assert len(command.servers()) == 2
    command.interrupt()
    result = command.wait(timeout=60)
    done = len(records(run_folder))
    assert result.code == 130, result.all
    assert f"stopped after {done} steps; go on with --resume" in result.err
    assert "Traceback" not in result.err
    assert newest_valid(run_folder / "checkpoints")[0] == run_folder / "checkpoints" / f"step_{done:06d}"
    result = cli("train", "--resume", small_run, f"run.steps={done + 1}", "parallel.tensor=2")
    assert result.code == 0, result.all
    assert [r["step"] for r in records(run_folder)] == list(range(done + 1))


def test_a_killed_rank_ends_the_run_which_loses_only_the_steps_after_its_last_checkpoint(start, cli, small_run, run_folder):
    """A checkpoint is complete soon after it was begun, not only when the next one is due."""
    command = start("train", small_run, "run.steps=500", "run.save_every=30", "parallel.tensor=2")
    newest = command.until(lambda: newest_valid(run_folder / "checkpoints")[0])
    assert newest.name == "step_000030" and len(records(run_folder)) < 60
    command.rank(1).kill()
    result = command.wait(timeout=60)
    assert result.code not in (0, 2, 130), result.all
    known = len(records(run_folder))
    assert newest_valid(run_folder / "checkpoints")[0] == newest
    result = cli("train", "--resume", small_run, f"run.steps={known + 1}", "parallel.tensor=2")
    assert result.code == 0, result.all
    assert [r["step"] for r in records(run_folder)] == list(range(known + 1))


def test_resuming_before_any_checkpoint_starts_over_with_one_record_a_step(start, cli, small_run, run_folder):
    command = start("train", small_run, "run.steps=500", "run.save_every=0", "eval.prompts=2")
    command.until(lambda: len(records(run_folder)) >= 2)
    command.end()
    result = cli("train", "--resume", small_run, "run.steps=1", "eval.prompts=2")
    assert result.code == 0, result.all
    assert "no usable checkpoint found" in result.out
    assert [r["step"] for r in records(run_folder)] == [0]
    assert [r["step"] for r in records(run_folder, "eval")] == [0, 1]


def test_ctrl_c_during_the_start_leaves_nothing_behind(start, small_run, run_folder):
    command = start("train", small_run, "run.steps=500", "parallel.tensor=2")
    command.until(command.servers)
    command.interrupt()
    result = command.wait(timeout=60)
    assert result.code == 130, result.all
    assert "Traceback" not in result.err, result.all
    assert not (run_folder / "checkpoints").exists() or newest_valid(run_folder / "checkpoints")[0] is not None

"""A stopped run resumes as if it had not been stopped: after its end, after Ctrl-C, and after a kill."""

import shutil
import signal

from safetensors.torch import load_file

from megatron_rl.diagnostics.samples import read_shown_samples
from megatron_rl.policy.checkpoint_state import newest_valid
from tests.e2e.command import records

TIMES = ("seconds/", "tokens_per_s")


def untimed(record):
    """Return the record without its times."""
    return {key: value for key, value in record.items() if not key.startswith(TIMES)}


def test_resuming_after_three_of_six_steps_repeats_the_other_three_bit_for_bit(cli, small_run, run_folder, tmp_path):
    fixed = ["rollout.deterministic=true", "optimizer.warmup_updates=8", "run.save_every=3", "run.steps=6"]
    fixed.append("run.show_samples=2")
    result = cli("train", small_run, *fixed)
    assert result.code == 0, result.all
    straight = shutil.copytree(run_folder, tmp_path / "straight")
    shutil.rmtree(run_folder / "checkpoints" / "step_000006")
    shutil.rmtree(run_folder / "hf")
    result = cli("train", "--resume", small_run, *fixed)
    assert result.code == 0, result.all
    assert len((run_folder / "log.dropped.jsonl").read_text().splitlines()) == 3
    assert [untimed(r) for r in records(run_folder)] == [untimed(r) for r in records(straight)]
    assert [(r["step"], r["version"]) for r in records(run_folder)] == [(step, step + 1) for step in range(6)]
    assert all(r["grad_norm"] > 0 for r in records(run_folder)[3:]), "with nothing learnt nothing would be compared"
    assert read_shown_samples(run_folder) == read_shown_samples(straight)
    assert [row.step for row in read_shown_samples(run_folder)] == [step for step in range(6) for _ in range(2 * 16)]
    ours, theirs = (load_file(run / "hf" / "model.safetensors") for run in (run_folder, straight))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_ctrl_c_saves_the_last_whole_step_and_the_run_goes_on_under_another_layout(start, cli, small_run, run_folder):
    command = start("train", small_run, "run.steps=500", "run.save_every=100", "parallel.tensor=2")
    command.until(lambda: len(records(run_folder)) >= 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGSTOP, signal.SIGCONT):
        command.rank(1).send_signal(number)  # rank 0 alone decides
    known = len(records(run_folder))
    command.until(lambda: len(records(run_folder)) >= known + 2)
    command.interrupt()
    result = command.wait(timeout=60)
    done = len(records(run_folder))
    assert result.code == 130, result.all
    assert f"stopped after {done} steps; go on with --resume" in result.err
    assert "Traceback" not in result.err
    assert newest_valid(run_folder / "checkpoints")[0] == run_folder / "checkpoints" / f"step_{done:06d}"
    result = cli("train", "--resume", small_run, f"run.steps={done + 1}")
    assert result.code == 0, result.all
    assert [r["step"] for r in records(run_folder)] == list(range(done + 1))


def test_ctrl_c_during_the_start_leaves_nothing_behind(start, small_run, run_folder):
    command = start("train", small_run, "run.steps=500", "parallel.tensor=2")
    command.until(command.servers)
    command.interrupt()
    result = command.wait(timeout=60)
    assert result.code == 130, result.all
    assert "Traceback" not in result.err, result.all
    assert not (run_folder / "checkpoints").exists() or newest_valid(run_folder / "checkpoints")[0] is not None


def test_a_run_that_is_killed_twice_is_one_whole_run_at_its_end(start, cli, small_run, run_folder):
    """A run killed before its first checkpoint starts again. Killed later, it loses the steps after the last one."""
    command = start("train", small_run, "run.steps=500", "run.save_every=0", "eval.prompts=2")
    command.until(lambda: len(records(run_folder)) >= 2)
    command.end()
    command = start(
        "train", "--resume", small_run, "run.steps=500", "run.save_every=10", "eval.prompts=2", "parallel.tensor=2"
    )
    newest = command.until(lambda: newest_valid(run_folder / "checkpoints")[0])
    # The checkpoint is complete soon after it was begun, not only when the next one is due.
    assert newest.name == "step_000010" and len(records(run_folder)) < 20
    command.rank(1).kill()
    result = command.wait(timeout=60)
    assert result.code == 137, result.all
    assert result.err.splitlines()[-1].startswith("rank 1 (pid ") and "killed by SIGKILL" in result.err
    assert "no usable checkpoint found" in result.out
    known = len(records(run_folder))
    assert newest_valid(run_folder / "checkpoints")[0] == newest
    result = cli("train", "--resume", small_run, f"run.steps={known + 1}", "eval.prompts=2")
    assert result.code == 0, result.all
    assert [r["step"] for r in records(run_folder)] == list(range(known + 1))
    assert [r["step"] for r in records(run_folder, "eval")] == [0, known + 1]

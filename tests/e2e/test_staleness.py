"""Rollouts overlap training: the bound on staleness holds, no group is trained twice, a killed run loses nothing."""

import signal

import pytest

from megatron_rl.policy.checkpoint_state import newest_valid
from megatron_rl.ports import free_port
from tests.e2e.command import assert_declared, assert_drawn_once, assert_refused, records
from tests.e2e.conftest import version_of
from tests.e2e.test_resume import untimed

ERPD = (
    "{name: erpd, advantage: grpo, teacher: {name: sapo, ratio_denominator: trainer_old}, teacher_updates: 2, "
    "signals: [{teacher: last, denominator: old, updates: 2}]}"
)


def test_an_asynchronous_run_keeps_its_bound_on_staleness(cli, small_run, run_folder):
    fixed = ["run.steps=6", "rollout.max_staleness=1", "eval.prompts=2", "eval.every=2", "run.attribute_every=3"]
    result = cli("train", small_run, *fixed)
    assert result.code == 0, result.all
    found = records(run_folder)
    assert [r["step"] for r in found] == list(range(6)) and [r["version"] for r in found] == list(range(1, 7))
    assert found[0]["staleness/max"] == 0, "there is nothing older than the weights a run begins with"
    assert all(r["staleness/max"] <= 1 for r in found) and sum(r["staleness/mean"] for r in found) > 2
    stale = found[-1]
    assert stale["mismatch/stale_1/tokens"] > 0 and stale["mismatch/stale_1/k3"] > 1e-5, "the weights were another's"
    assert [r["version"] for r in records(run_folder, "eval")] == [1, 3, 5, 7]
    assert [r["step"] for r in records(run_folder, "attribution")] == [3, 6]
    assert_drawn_once(run_folder)
    assert_declared(run_folder)


def test_groups_beyond_need_are_given_up_and_groups_without_a_signal_replaced(cli, small_run, run_folder):
    fixed = ["run.steps=4", "rollout.oversample=1.5", "rollout.max_resampled_groups=2", "rollout.samples_per_prompt=4"]
    result = cli("train", small_run, *fixed)
    assert result.code == 0, result.all
    found = records(run_folder)
    assert all(r["rollout/given_up"] + r["rollout/replaced"] >= 4 and r["rollout/given_up_share"] > 0 for r in found)
    assert all(r["rollout/replaced"] <= 2 for r in found) and sum(r["rollout/replaced"] for r in found) > 0
    assert sum(r["rollout/kept_equal"] for r in found) > 0, "beyond the bound they are kept, and counted"
    assert all(r["staleness/max"] == 0 for r in found)
    assert_drawn_once(run_folder)


def test_a_deterministic_run_that_overlaps_and_is_killed_in_between_is_the_one_that_was_not(
    start, cli, small_run, tmp_path
):
    fixed = ["rollout.deterministic=true", "rollout.max_staleness=2", "rollout.max_resampled_groups=2"]
    fixed += ["optimizer.warmup_updates=8", "run.steps=9", "run.save_every=3"]
    result = cli("train", small_run, *fixed, "run.name=straight")
    assert result.code == 0, result.all
    straight, killed = tmp_path / "runs" / "straight", tmp_path / "runs" / "killed"
    command = start("train", small_run, *fixed, "run.name=killed")
    command.until(lambda: newest_valid(killed / "checkpoints")[0] is not None and len(records(killed)) >= 4)
    command.rank(0).send_signal(signal.SIGKILL)
    assert command.wait(timeout=60).code not in (0, 2, 130)
    result = cli("train", "--resume", small_run, *fixed, "run.name=killed")
    assert result.code == 0, result.all
    assert "finished groups are read back" in result.out
    ours, theirs = ([untimed(r) for r in records(run)] for run in (killed, straight))
    assert ours == theirs
    assert [r["staleness/max"] for r in ours] == [0, 1, *[2] * 7]
    assert sum(r["rollout/replaced"] for r in ours) > 0
    assert_drawn_once(killed)


def test_a_killed_run_goes_on_within_the_bound_with_what_was_finished(start, cli, small_run, run_folder):
    fixed = ["rollout.max_staleness=1", "run.save_every=2", "rollout.oversample=1.25"]
    command = start("train", small_run, *fixed, "run.steps=500")
    command.until(lambda: len(records(run_folder)) >= 5)
    command.rank(0).send_signal(signal.SIGKILL)
    command.wait(timeout=60)
    torn = sorted((run_folder / "rollouts").glob("*.groups"))[-1]
    torn.write_bytes(torn.read_bytes()[:-7])
    known = len(records(run_folder))
    result = cli("train", "--resume", small_run, *fixed, f"run.steps={known + 2}")
    assert result.code == 0, result.all
    assert "finished groups are read back" in result.out
    found = records(run_folder)
    assert [r["step"] for r in found] == list(range(known + 2))
    assert all(r["staleness/max"] <= 1 for r in found)
    assert_drawn_once(run_folder)


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_requests_that_run_through_a_weight_update_go_on_and_their_tokens_know_their_versions(
    mode, start, cli, small_run, run_folder, arithmetic_model
):
    # One request at a time makes the engine slower than the trainer, so updates meet running requests. A larger
    # learning rate would teach the model short responses in its first update.
    port = free_port()
    serving = ["--port", str(port), "--threads", "1", "--deterministic"]
    url = f"http://127.0.0.1:{port}"
    start("serve", "--model", str(arithmetic_model), *serving).until(lambda: version_of(url))
    fixed = [f"rollout.urls=[{url}]", "rollout.max_staleness=1", f"rollout.update_mode={mode}", "run.steps=5"]
    fixed += [
        "rollout.prompts_per_step=24",
        "rollout.max_new_tokens=40",
        "optimizer.updates_per_step=1",
        "optimizer.lr=1e-6",
        "rollout.timeout_s=300",
        "objective.corrections=[{name: stale_mask}]",
    ]
    result = cli("train", small_run, *fixed)
    assert result.code == 0, result.all
    found = records(run_folder)
    assert all(r["staleness/max"] <= 1 for r in found) and any(0 < r["staleness/mean"] < 1 for r in found)
    masked = [r["stale_mask/masked"] for r in found]
    assert masked == pytest.approx([r["staleness/mean"] for r in found]), "the objective knows the age of every token"
    counts = {name: sum(r[f"rollout/{name}"] for r in found) for name in ("resumed", "retractions")}
    assert (counts["resumed"] > 0, counts["retractions"] > 0) == (mode == "abort", mode == "retract"), counts


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["rollout.deterministic=true", "rollout.oversample=1.5"],
            ["rollout.oversample: 1.5", "rollout.deterministic"],
        ),
        (
            ["rollout.max_resampled_groups=2", "rollout.samples_per_prompt=1"],
            ["rollout.max_resampled_groups", "samples_per_prompt"],
        ),
        (
            ["rollout.max_staleness=1", f"objective={ERPD}"],
            ["rollout.max_staleness: 1", "erpd"],
        ),
        (["rollout.oversample=1.5", f"objective={ERPD}"], ["rollout.oversample: 1.5", "erpd"]),
        (["rollout.update_mode=in_place"], ["rollout.update_mode: in_place", "max_staleness"]),
        (["rollout.transport=tensor", "rollout.weights_dir=there"], ["rollout.weights_dir", "transport is tensor"]),
        (["rollout.bucket_mb=64"], ["rollout.bucket_mb: 64", "disk"]),
        (["rollout.sglang.tensor=2"], ["sglang", "engine is embedded"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(refused, small_run, run_folder, settings, words):
    assert_refused(refused("train", small_run, *settings), "ConfigError", *words)
    assert not run_folder.exists()

"""The record of a step equals numbers that are computed by hand."""

import json
import math

import numpy as np
import pytest

from megatron_rl.algorithms.erpd.records import RoundRecords, mu_record
from megatron_rl.algorithms.policy_gradient import split_updates
from megatron_rl.diagnostics import RunLog, read_log
from megatron_rl.errors import UserError
from megatron_rl.objectives import make_objective
from megatron_rl.policy.actor import UpdateStats
from megatron_rl.sampling.batch import make_batch
from megatron_rl.trainer.metrics import Stopwatch, step_record, trajectory_k3
from megatron_rl.types import Batch
from tests.trajectories import make_trajectory

PAIRED = ("ratio", "kl", "mismatch", "dp", "chi2", "token_mult", "envelope", "worst")  # these keys need logmu


def parts(logmu: bool = True) -> list[Batch]:
    """Return two updates of one group each, with responses of 1, 2 and 3 tokens after prompts of 2."""
    made = [
        make_trajectory(i, group, (5, 6), range(n), reward, logmu=[-1.0] * n if logmu else None)
        for i, (group, n, reward) in enumerate([(0, 1, 1.0), (0, 2, 0.0), (1, 3, 1.0)])
    ]
    return split_updates(make_batch(made, "mean"), 2)


def stats_of(part: Batch, logp: float, **more: float) -> UpdateStats:
    """Return statistics of an update in which every token has this logp; `more` has norm, lr and loss."""
    column = np.full(len(part.tokens), logp, dtype=np.float32)
    return UpdateStats(
        grad_norm=more["norm"],
        lr=more["lr"],
        loss=more["loss"],
        metrics={"penalty": logp},
        logp=column,
        entropy=-column,
    )


def record_of(parts: list[Batch]) -> dict:
    """Return the record of step 4, from version 5. Every logp of the second update is one lower."""
    stats = [stats_of(parts[0], -1.0, norm=1.0, lr=0.1, loss=2.0), stats_of(parts[1], -2.0, norm=3.0, lr=0.2, loss=4.0)]
    return step_record(4, 5, parts, stats, Stopwatch(), sampled={"truncated": 0.25})


def test_the_record_says_what_the_step_did():
    record = record_of(parts())
    expected = {
        "kind": "step",
        "step": 4,
        "version": 5,
        "reward/mean": 2 / 3,
        "reward/std": math.sqrt(2) / 3,
        "pass_rate": 2 / 3,
        "loss": 3.0,
        "grad_norm": 2.0,
        "lr": 0.2,
        "entropy": 1.5,
        "response_length/mean": 2.0,
        "truncated": 0.25,
        "tokens/response": 6,
        "tokens/total": 12,
        "penalty": -1.5,
    }
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    assert all(isinstance(value, (int, float, str)) for name, value in record.items() if not name.startswith("worst/"))


def test_a_metric_with_the_name_of_another_key_is_refused_not_overwritten():
    stats = [stats_of(part, -1.0, norm=1.0, lr=0.1, loss=2.0) for part in parts()]
    with pytest.raises(UserError, match=r"metrics \['penalty'\] have the names of other log keys"):
        step_record(4, 5, parts(), stats, Stopwatch(), sampled={"penalty": 0.25})


def test_the_worst_trajectories_of_all_updates_are_in_the_record_and_the_log_takes_them(tmp_path):
    record = record_of(parts())
    assert record["worst/trajectory"] == [2, 0, 1] and json.loads(record["worst/prompt_ids"]) == ["p", "p", "p"]
    assert record["worst/max"] == record["worst/mean"] == [1.0, 0.0, 0.0]
    with RunLog(tmp_path) as log:
        log.append(record)
    assert read_log(tmp_path)[0]["worst/max"] == [1.0, 0.0, 0.0]


def test_k3_of_each_trajectory_covers_its_trained_tokens_alone():
    made = [
        make_trajectory(7, 0, (5,), (1, 2, 3), 1.0, logmu=[-1, -1, -1], mask=[1, 0, 1]),
        make_trajectory(9, 0, (5,), (1,), 0.0, logmu=[-1], mask=[0]),
        make_trajectory(8, 0, (5,), (1,), 0.0, logmu=[-1]),
    ]
    part = make_batch(made, "mean")
    logp = np.array([0, -1, -9, -3, 0, -9, 0, -1.5])  # one entry per token, prompts included
    assert trajectory_k3(part, logp) == pytest.approx({7: (math.exp(-2) + 1) / 2, 8: math.exp(-0.5) - 0.5})
    assert trajectory_k3(part.with_columns(logmu=None), logp) == {}


def test_the_mismatch_of_equal_weights_is_that_of_the_first_update_alone():
    record = record_of(parts())
    assert record["mismatch/ratio/max"] == record["mismatch/ratio/min"] == 1.0 and record["mismatch/kl/k3"] == 0.0
    assert record["ratio/max"] == 1.0 and record["ratio/min"] == pytest.approx(math.exp(-1))
    assert record["kl/k1"] == pytest.approx(0.5)  # half of the six trained tokens lost one nat


def test_staleness_counts_trained_tokens_alone_and_the_mismatch_is_split_by_it():
    """One response has tokens of versions 5, 5 and 4, and its second token, from a tool, is not trained.

    The other response has one token of version 3. logp - logmu is -1 for all tokens.
    """
    made = [
        make_trajectory(0, 0, (5,), (1, 2, 3), 1.0, logmu=[-1, 0, -1], versions=[5, -1, 4], mask=[1, 0, 1]),
        make_trajectory(1, 0, (5,), (1,), 0.0, logmu=[-1], versions=[3]),
    ]
    part = make_batch(made, "mean")
    record = step_record(
        4, 5, [part], [stats_of(part, -2.0, norm=1.0, lr=0.1, loss=0.0)], Stopwatch(), sampled={"truncated": 0.0}
    )
    assert (record["staleness/mean"], record["staleness/max"]) == (1.0, 2.0)
    assert [record[f"mismatch/stale_{s}/tokens"] for s in range(3)] == [1, 1, 1]
    assert record["mismatch/stale_2/k3"] == pytest.approx(math.exp(-1)) and record["mismatch/stale_0/mean_abs"] == 1
    fresh = step_record(
        4, 5, parts(), [stats_of(p, -1.0, norm=1, lr=1, loss=1) for p in parts()], Stopwatch(), sampled={}
    )
    assert not [name for name in fresh if "stale" in name], "the engines named no versions"


def test_updates_whose_turns_are_all_void_are_recorded_without_ratios():
    void = [part.with_columns(mask=np.zeros_like(part.mask)) for part in parts()]
    record = record_of(void)
    assert not any(key.startswith(PAIRED) for key in record)
    assert (record["tokens/response"], record["entropy"], record["loss"]) == (0, 0.0, 3.0)
    half = record_of([void[0], parts()[1]])
    assert half["ratio/max"] == pytest.approx(math.exp(-1)) and not any(key.startswith("mismatch") for key in half)


def test_without_behavior_log_probabilities_no_ratio_is_claimed():
    assert not [name for name in record_of(parts(logmu=False)) if name.startswith(PAIRED)]


@pytest.mark.parametrize("logmu", [True, False])
def test_a_round_compares_old_policy_and_student_with_the_engine_s_where_it_reported_any(logmu):
    batch = make_batch(
        [make_trajectory(i, 0, (5, 6), (7, 8), float(i), logmu=[-1, -1] if logmu else None) for i in range(2)],
        "mean",
    )
    trained = batch.mask > 0
    logold, logp = (np.where(trained, value, 9.0).astype(np.float32) for value in (-1.0, -2.0))
    update = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "entropy": 0.5, "tokens": 4.0}
    made = RoundRecords(
        batch, logold, [update], make_objective({"name": "erpd_distill"}), {}, mu_record(batch, logold, logp)
    )
    step = made.records(0, 1, Stopwatch(), {"truncated": 0.0})[1]
    if logmu:
        assert step["mismatch/ratio/max"] == 1 and step["mismatch/kl/k1"] == 0
        assert step["kl/k1"] == 1 and step["ratio/max"] == step["ratio/min"] == pytest.approx(math.exp(-1))
    else:
        assert not [name for name in step if name.startswith(PAIRED)]


def test_a_stopwatch_adds_up_the_phases_of_a_step():
    watch = Stopwatch()
    for _ in range(2):
        with watch("update"):
            pass
    with watch("sync"):
        pass
    assert watch.seconds.keys() == {"update", "sync"}
    assert 0 <= watch.seconds["update"] + watch.seconds["sync"] <= watch.total

"""A mixture of experts trains spread over ranks, with engines that fuse experts, and with replayed routing."""

import pytest

from tests.e2e.command import assert_declared, assert_refused, records
from tests.e2e.models import make_arithmetic_mixture
from tests.e2e.test_sglang import PYTHON, SGLANG


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of the small arithmetic model with experts."""
    return make_arithmetic_mixture(tmp_path_factory.mktemp("mixture") / "hf")


SPREAD = ("parallel.data=2", "parallel.expert=2", "rollout.record_logmu=true", "optimizer.updates_per_step=1")


def test_replayed_routing_is_what_the_engines_chose(cli, small_run, run_folder, mixture):
    """In float32 the trainer chooses the same experts in the first update of a step. Each step here has one update."""
    run = (*SPREAD, f"model.path={mixture}", "run.steps=3", "rollout.routing_replay=true")
    result = cli("train", small_run, *run)
    assert result.code == 0, result.all
    assert_declared(run_folder)
    found = records(run_folder)
    assert [r["step"] for r in found] == [0, 1, 2]
    for record in found:
        assert record["routing/agreement"] > 0.999
        assert 0.5 < record["routing/replayed"] < 1, (
            "of every trajectory all tokens but the last, which no engine took in"
        )
        assert record["mismatch/kl/k3"] < 1e-6


@pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-sglang: make sglang")
def test_replayed_routing_is_what_sglang_chose(start, small_run, run_folder, mixture):
    run = (
        *SPREAD,
        *SGLANG,
        f"model.path={mixture}",
        "run.steps=3",
        "rollout.routing_replay=true",
        "rollout.transport=distributed",
    )
    result = start("train", small_run, *run).wait(timeout=400)
    assert result.code == 0, result.all
    found = records(run_folder)
    assert [r["step"] for r in found] == [0, 1, 2]
    for record in found:
        assert record["routing/agreement"] > 0.999 and 0.5 < record["routing/replayed"] < 1
        assert abs(record["mismatch/ratio/min"] - 1) < 1e-4 and abs(record["mismatch/ratio/max"] - 1) < 1e-4


@pytest.mark.parametrize("transport", ["disk", "distributed"])
def test_without_replay_the_same_run_records_none(cli, small_run, run_folder, mixture, transport):
    result = cli("train", small_run, *SPREAD, f"model.path={mixture}", "run.steps=2", f"rollout.transport={transport}")
    assert result.code == 0, result.all
    record = records(run_folder)[-1]
    assert not any(name.startswith("routing/") for name in record)
    assert record["mismatch/kl/k3"] < 1e-6, "the engines have the weights of the trainer, expert by expert"


def test_replay_on_a_dense_model_is_refused_before_anything_starts(refused, small_run):
    assert_refused(
        refused("train", small_run, "rollout.routing_replay=true"), "ConfigError", "routing_replay", "dense model"
    )


def test_experts_that_the_ranks_cannot_share_are_refused(refused, small_run, mixture):
    result = refused("train", small_run, f"model.path={mixture}", "parallel.expert=2")
    assert_refused(result, "ConfigError", "parallel", "expert: 2 must divide tensor x context x data = 1")

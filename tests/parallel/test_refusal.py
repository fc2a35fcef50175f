"""An update with non-finite numbers is refused on every rank, by trajectory id, and does not change the policy."""

import re

import numpy as np
import pytest

from tests.parallel.refusal_steps import MARKED
from tests.parallel.steps import make_batch

STEPS = "tests.parallel.refusal_steps"
NAN, INF = float("nan"), float("inf")
LAYOUTS = {"pp2": {"pipeline": 2}, "dp2": {"data": 2}, "tp2": {"tensor": 2}, "cp2": {"context": 2}}


@pytest.fixture(scope="module")
def undisturbed(two_ranks, qwen3):
    """Return a function: layout -> two updates without poison, computed once per layout."""
    known = {}

    def run(name):
        if name not in known:
            known[name] = two_ranks.run(STEPS, "two_updates", model=qwen3, layout=LAYOUTS[name])
        return known[name]

    return run


def named_ids(error: str) -> list[int]:
    found = re.fullmatch(
        r"PrecisionError: non-finite log-probabilities in trajectories \[([\d, ]+)\]: the update is refused, .*", error
    )
    assert found, error
    return [int(word) for word in found[1].split(",")]


def assert_refused(answers, expected_ids, reference):
    for answer, plain in zip(answers, reference, strict=True):
        assert [named_ids(error) for error in answer["errors"]] == [expected_ids, expected_ids]
        assert answer["untouched"]
        assert plain["moved"], "an update that moves nothing could not be told from a refused one"
        np.testing.assert_equal(answer["loss"], plain["loss"])
        assert answer["weights"].keys() == plain["weights"].keys()
        assert all(np.array_equal(answer["weights"][name], plain["weights"][name]) for name in plain["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_poisoned_last_stage_names_every_trained_trajectory(two_ranks, qwen3, undisturbed, layout, value):
    batch = make_batch()
    trained = np.add.reduceat(batch.mask, batch.cu_seqlens[:-1]) > 0
    answers = two_ranks.run(
        STEPS, "refused_update", model=qwen3, layout=LAYOUTS[layout], kind="last_stage", value=value
    )
    assert_refused(answers, batch.ids[trained].tolist(), undisturbed(layout))


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_a_poisoned_embedding_names_the_one_trajectory_that_uses_it(two_ranks, qwen3, undisturbed, layout):
    answers = two_ranks.run(STEPS, "refused_update", model=qwen3, layout=LAYOUTS[layout], kind="embedding", value=NAN)
    assert_refused(answers, [1000 + MARKED], undisturbed(layout))


@pytest.mark.parametrize("rank", [0, 1])
def test_poison_on_one_replica_refuses_the_update_on_all(two_ranks, qwen3, undisturbed, rank):
    answers = two_ranks.run(
        STEPS, "refused_update", model=qwen3, layout=LAYOUTS["dp2"], kind="last_stage", value=NAN, only_rank=rank
    )
    named = named_ids(answers[0]["errors"][0])
    batch = make_batch()
    trained = np.add.reduceat(batch.mask, batch.cu_seqlens[:-1]) > 0
    assert 0 < len(named) < trained.sum(), "only what that replica was given can be named"
    assert_refused(answers, named, undisturbed("dp2"))


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_a_gradient_that_overflows_leaves_the_policy_as_it_was(two_ranks, qwen3, layout):
    for answer in two_ranks.run(STEPS, "overflowing_gradient", model=qwen3, layout=LAYOUTS[layout]):
        assert re.fullmatch(r"PrecisionError: gradient norm is (inf|nan): the update is refused, .*", answer["error"])
        assert answer["untouched"]


@pytest.mark.parametrize(
    ("layout", "sections"),
    [("pp2", {}), ("tp2", {}), ("dp2", {"optimizer": {"distributed": True}})],
    ids=["pp2", "tp2", "dp2_distributed"],
)
def test_all_ranks_repeat_a_float16_update_that_overflows_until_the_scale_fits(two_ranks, qwen3, layout, sections):
    arguments = {"model": qwen3, "layout": LAYOUTS[layout], **sections}
    high = two_ranks.run(STEPS, "update_with_scale", scale=2.0**20, **arguments)
    (scale,) = {answer["scale"] for answer in high}
    assert scale < 2.0**20 and all(answer["moved"] for answer in high)
    fits = two_ranks.run(STEPS, "update_with_scale", scale=scale, **arguments)
    assert fits == high


def test_a_float16_gradient_that_no_scale_fits_leaves_the_policy_as_it_was(two_ranks, qwen3):
    sections = {"precision": {"train": "fp16"}}
    for answer in two_ranks.run(STEPS, "overflowing_gradient", model=qwen3, layout=LAYOUTS["pp2"], **sections):
        assert re.fullmatch(r"PrecisionError: gradients overflow float16 \d+ times, .*untouched; .*", answer["error"])
        assert answer["untouched"]

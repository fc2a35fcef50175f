"""A step of one rank on a GPU in fp32, on megatron-core's local layers, is that of plain transformers on a CPU."""

import numpy as np
import pytest

from tests.gpu.needs import needs_cuda, needs_te, relative
from tests.parallel.group import RankGroup
from tests.parallel.test_checkpoint import same_bits
from tests.parallel.test_moe import moe_reference
from tests.parallel.test_parity import reference_step

pytestmark = needs_cuda
RECOMPUTE = ["none", "selective", "full"]


@pytest.fixture(scope="module")
def one_rank():
    group = RankGroup(1)
    yield group
    group.close()


@pytest.fixture(scope="module")
def reference(qwen3):
    return reference_step(qwen3)


def assert_near(result, reference):
    """Assert that a step is the reference up to another order of sums: a hundred times fp32's unit and Adam's share."""
    np.testing.assert_allclose(result["logp"], reference["logp"], atol=1e-4)
    np.testing.assert_allclose(result["entropy"], reference["entropy"], atol=2e-4)
    assert result["loss"] == pytest.approx(reference["loss"], rel=1e-4, abs=1e-5)
    assert result["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    for kind in ("grads", "weights"):
        assert set(result[kind]) == set(reference[kind])
        for name, value in reference[kind].items():
            assert relative(result[kind][name], value) < 1e-4, (kind, name)
    assert result["replicas_differ"] == 0


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_step_is_the_reference_whatever_is_recomputed(one_rank, qwen3, reference, recompute):
    layout = {"recompute": recompute}
    assert_near(one_rank.run("tests.parallel.steps", "step", model=qwen3, layout=layout)[0], reference)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_of_experts_is_the_reference(one_rank, qwen3_moe, recompute):
    layout = {"recompute": recompute}
    found = one_rank.run("tests.parallel.moe_steps", "step", model=qwen3_moe, layout=layout)[0]
    assert_near(found, moe_reference(qwen3_moe))


def resumed(group, model, folder, **arguments):
    """Save and go on, then load and go on. Return both results."""
    common = {"model": model, "folder": folder, **arguments}
    return [
        group.run("tests.parallel.checkpoint_steps", function, **common)[0]
        for function in ("save_and_go_on", "load_and_go_on")
    ]


def assert_resumed(saved, loaded):
    """Assert that what was loaded is what was saved, bit for bit, and that the next step goes on from there.

    Some kernels of a GPU add in an order that changes, so the next steps are compared up to this.
    """
    assert loaded["state"].step == 2 and same_bits(loaded["weights"], saved["weights"])
    assert np.array_equal(loaded["random"], saved["random"])
    np.testing.assert_allclose(loaded["next"]["logp"], saved["next"]["logp"], atol=1e-3)
    assert loaded["next"]["grad_norm"] == pytest.approx(saved["next"]["grad_norm"], rel=1e-2)
    for name, value in saved["next"]["weights"].items():
        moved = relative(loaded["weights"][name], value)
        # Without the optimizer's moments, the next step would be another one.
        assert moved > 0 and relative(loaded["next"]["weights"][name], value) < 0.05 * moved + 1e-6, name


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_a_run_goes_on_from_its_checkpoint(one_rank, request, tmp_path, model):
    assert_resumed(*resumed(one_rank, request.getfixturevalue(model), tmp_path, layout={}))


@needs_te
@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_a_run_on_transformer_engine_goes_on_from_its_checkpoint(one_rank, request, tmp_path, model):
    """Also with grouped experts and the fused Adam. The weights are bf16, so a rounding of a few is allowed."""
    saved, loaded = resumed(one_rank, request.getfixturevalue(model), tmp_path, layout={}, precision={"train": "bf16"})
    assert loaded["state"].step == 2 and same_bits(loaded["weights"], saved["weights"])
    assert np.abs(loaded["next"]["logp"] - saved["next"]["logp"]).mean() < 1e-2
    for name, value in saved["next"]["weights"].items():
        assert relative(loaded["next"]["weights"][name], value) < 2**-7, name


@pytest.mark.parametrize(
    ("train", "a_layer"), [("fp32", 4), pytest.param("bf16", 0, marks=needs_te)], ids=["local", "transformer_engine"]
)
def test_a_micro_batch_waits_for_the_gpu_only_in_unfused_rope(one_rank, qwen3, train, a_layer):
    """The batch has 5 micro-batches of 192 tokens, or 3 of 384; the model has 4 layers."""
    five, three = (
        one_rank.run("tests.gpu.te_steps", "waits", model=qwen3, budget=budget, precision={"train": train})[0]
        for budget in (192, 384)
    )
    more = {line: (five.get(line, 0) - three.get(line, 0)) / 2 for line in five | three}
    assert sum(more.values()) == 4 * a_layer, {line: count for line, count in more.items() if count}

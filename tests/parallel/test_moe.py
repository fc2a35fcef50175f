"""A mixture of experts makes the same training step under every layout of its experts and in plain transformers."""

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_rl.config import PrecisionConfig
from megatron_rl.policy.checkpoint_state import TrainState
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.quantized import WireTensors
from tests.parallel.test_alp import PlainPerturbation, assert_same_perturbed_step
from tests.parallel.test_checkpoint import close, round_trip, same_bits
from tests.parallel.test_parity import assert_same_step, reference_step, worst
from tests.parallel.test_weights import check as check_round_trip
from tests.policies import embedded_plan

FULL = {"recompute": "full"}
TWO = {
    "ep2_dp2": {"expert": 2, "data": 2},
    "ep2_tp2": {"expert": 2, "tensor": 2, "sequence": True},
    "ep2_cp2": {"expert": 2, "context": 2},
    "ep2_dp2_recompute": {"expert": 2, "data": 2, **FULL},
    "ep2_cp2_selective": {"expert": 2, "context": 2, "recompute": "selective"},
    "ep1_dp2": {"data": 2},
    "ep1_tp2": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_vpp2_recompute": {"pipeline": 2, "virtual_pipeline": 2, **FULL},
}
FOUR = {
    "ep2_tp2_dp2": {"expert": 2, "tensor": 2, "data": 2, "sequence": True},
    "ep2_tp2_pp2_recompute": {"expert": 2, "tensor": 2, "pipeline": 2, "sequence": True, **FULL},
    "ep4_tp2_dp2": {"expert": 4, "tensor": 2, "data": 2, "sequence": True},
    "ep2_cp2_pp2": {"expert": 2, "context": 2, "pipeline": 2},
}


def per_expert(tensors):
    """Split the experts of a layer. transformers has one parameter for all, files and trainer one tensor per expert."""
    out = {}
    for name, value in tensors.items():
        if name.endswith(".experts.gate_up_proj"):
            for i, both in enumerate(value):
                gate, up = np.split(both, 2)
                out[name.replace("gate_up_proj", f"{i}.gate_proj.weight")] = gate
                out[name.replace("gate_up_proj", f"{i}.up_proj.weight")] = up
        elif name.endswith(".experts.down_proj"):
            out |= {name.replace("down_proj", f"{i}.down_proj.weight"): down for i, down in enumerate(value)}
        else:
            out[name] = value
    return out


def moe_reference(folder, **options):
    step = reference_step(folder, **options)
    return step | {"grads": per_expert(step["grads"]), "weights": per_expert(step["weights"])}


@pytest.fixture(scope="module")
def reference(qwen3_moe):
    return moe_reference(qwen3_moe)


@pytest.mark.parametrize("layout", TWO.values(), ids=TWO)
def test_two_rank_layouts_make_the_reference_step(two_ranks, qwen3_moe, reference, layout):
    results = two_ranks.run("tests.parallel.moe_steps", "step", model=qwen3_moe, layout=layout)
    assert_same_step(results[0], reference)
    assert [r["held"] for r in results] == [4 * 8 // layout.get("expert", 1) // layout.get("pipeline", 1)] * 2


@pytest.mark.parametrize("layout", FOUR.values(), ids=FOUR)
def test_four_rank_layouts_make_the_reference_step(four_ranks, qwen3_moe, reference, layout):
    assert_same_step(four_ranks.run("tests.parallel.moe_steps", "step", model=qwen3_moe, layout=layout)[0], reference)


@pytest.mark.parametrize("layout", [TWO["ep2_dp2"], TWO["pp2"]], ids=["ep2_dp2", "pp2"])
def test_gates_that_are_not_normalized_make_the_reference_step(two_ranks, qwen3_moe_unnormalized, layout):
    reference = moe_reference(qwen3_moe_unnormalized)
    assert_same_step(
        two_ranks.run("tests.parallel.moe_steps", "step", model=qwen3_moe_unnormalized, layout=layout)[0], reference
    )


@pytest.mark.parametrize(
    "layout", [TWO["ep2_dp2"], TWO["ep2_tp2"], TWO["ep1_dp2"]], ids=["ep2_dp2", "ep2_tp2", "ep1_dp2"]
)
def test_the_distributed_optimizer_makes_the_reference_update(two_ranks, qwen3_moe, reference, layout):
    result = two_ranks.run(
        "tests.parallel.moe_steps", "step", model=qwen3_moe, layout=layout, optimizer={"distributed": True}
    )[0]
    assert abs(result["grad_norm"] / reference["grad_norm"] - 1) < 1e-5
    assert worst(result["weights"], reference["weights"]) < (1e-5,)


@pytest.mark.parametrize("layout", [TWO["ep2_dp2"], TWO["ep2_tp2"]], ids=["ep2_dp2", "ep2_tp2"])
def test_bfloat16_training_stays_near_the_reference(two_ranks, qwen3_moe, reference, layout):
    result = two_ranks.run(
        "tests.parallel.moe_steps", "step", model=qwen3_moe, layout=layout, precision={"train": "bf16"}
    )[0]
    # If two experts have almost equal scores, rounding chooses another one. So single tokens have large errors.
    assert 0 < np.median(np.abs(result["logp"] - reference["logp"])[reference["logp"] != 0]) < 0.02
    assert abs(result["grad_norm"] / reference["grad_norm"] - 1) < 0.05


@pytest.mark.parametrize("layout", [TWO["ep2_dp2"], TWO["ep2_tp2"]], ids=["ep2_dp2", "ep2_tp2"])
def test_experts_shifted_by_one_fail_the_same_comparison(two_ranks, qwen3_moe, reference, layout):
    result = two_ranks.run("tests.parallel.moe_steps", "step", model=qwen3_moe, layout=layout, sabotage="shifted")[0]
    with pytest.raises(AssertionError):
        assert_same_step(result, reference)
    assert np.abs(result["logp"] - reference["logp"]).max() > 0.1


@pytest.mark.parametrize("layout", TWO.values(), ids=TWO)
def test_two_ranks_give_the_stored_bytes_back(two_ranks, qwen3_moe, layout):
    check_round_trip(two_ranks, qwen3_moe, layout)


@pytest.mark.parametrize("layout", FOUR.values(), ids=FOUR)
def test_four_ranks_give_the_stored_bytes_back(four_ranks, qwen3_moe, layout):
    check_round_trip(four_ranks, qwen3_moe, layout)


def test_experts_taken_for_dense_parameters_fail_the_same_comparison(two_ranks, qwen3_moe, reference):
    """megatron-core treats experts as dense if one rank holds all of them: tensor-parallel gradients are not summed."""
    result = two_ranks.run(
        "tests.parallel.moe_steps", "step", model=qwen3_moe, layout=TWO["ep1_tp2"], sabotage="dense"
    )[0]
    with pytest.raises(AssertionError):
        assert_same_step(result, reference)
    assert worst(result["grads"], reference["grads"])[0] > 0.1


@pytest.mark.parametrize("name", ["ep2_dp2", "ep2_tp2", "ep2_dp2_recompute", "pp2_vpp2_recompute"])
def test_perturbed_layers_make_the_reference_step(two_ranks, qwen3_moe, name):
    plain = PlainPerturbation()
    reference = moe_reference(qwen3_moe, perturbation=plain)
    result = two_ranks.run("tests.parallel.alp_steps", "step", model=qwen3_moe, layout=TWO[name])[0]
    assert_same_perturbed_step(result, reference, plain)


SHARDED = {"optimizer": {"distributed": True}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"layout": TWO["ep2_dp2"]},
        {"layout": TWO["ep2_tp2"], "precision": {"train": "bf16"}},
        {"layout": TWO["ep2_dp2"], **SHARDED},
        {"layout": TWO["ep1_dp2"], **SHARDED},
        {"layout": TWO["pp2"]},
    ],
    ids=["ep2_dp2", "ep2_tp2_bf16", "ep2_dp2_sharded", "ep1_dp2_sharded", "pp2"],
)
def test_a_checkpoint_continues_bit_for_bit(two_ranks, qwen3_moe, tmp_path, arguments):
    saved, loaded = round_trip(two_ranks, qwen3_moe, tmp_path, arguments, arguments)
    assert loaded["state"] == TrainState(step=2, version=3, updates=2, seed=9)
    assert same_bits(loaded["weights"], saved["weights"])
    assert not same_bits(loaded["next"]["weights"], loaded["weights"])
    assert same_bits(loaded["next"]["weights"], saved["next"]["weights"])


@pytest.mark.parametrize("loading", ["ep1_tp2", "pp2", "ep1_dp2"])
@pytest.mark.parametrize("sharded", [{}, SHARDED], ids=["whole", "sharded"])
def test_a_checkpoint_of_spread_experts_loads_under_other_layouts(two_ranks, qwen3_moe, tmp_path, loading, sharded):
    saving = {"layout": TWO["ep2_dp2"], **sharded}
    saved, loaded = round_trip(two_ranks, qwen3_moe, tmp_path, saving, {"layout": TWO[loading], **sharded})
    assert same_bits(loaded["weights"], saved["weights"])
    assert close(loaded["next"]["weights"], saved["next"]["weights"]), "the optimizer's state was not carried over"


def test_a_quantized_export_of_spread_experts_is_that_of_the_whole_tensors(two_ranks, qwen3_moe):
    precision = {"train": "bf16", "rollout": "fp8_blockwise"}
    answers = two_ranks.run(
        "tests.parallel.weight_steps", "quantized_export", model=qwen3_moe, layout=TWO["ep2_dp2"], precision=precision
    )
    stored = {name: tensor.bfloat16() for name, tensor in load_file(qwen3_moe / "model.safetensors").items()}
    sent = {
        name: tensor_digest(t)
        for name, t in WireTensors(stored.items(), embedded_plan(PrecisionConfig(**precision), num_layers=4))
    }
    assert answers == [sent, {}]
    assert "model.layers.1.mlp.experts.7.down_proj.weight_scale_inv" in sent
    assert "model.layers.1.mlp.gate.weight_scale_inv" not in sent

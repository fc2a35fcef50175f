"""A step on Transformer Engine's Python layers equals the step on megatron-core's local layers.

Its compiled functions are plain torch (`compiled.py`). So these tests prove what is passed to Transformer Engine and
what is done with its results, and nothing about its kernels.
"""

import numpy as np
import pytest
from safetensors import safe_open

STEPS, ALP_STEPS, TE_STEPS = "tests.parallel.steps", "tests.parallel.alp_steps", "tests.te_cpu.steps"
CASES = {
    "dense": (STEPS, "qwen3", {"data": 2}),
    "tp2_sp": (STEPS, "qwen3", {"tensor": 2, "sequence": True}),
    "pp2_recompute": (STEPS, "qwen3", {"pipeline": 2, "recompute": "full"}),
    "experts": (STEPS, "qwen3_moe", {"expert": 2, "data": 2}),
    "alp_recompute": (ALP_STEPS, "qwen3", {"tensor": 2, "sequence": True, "recompute": "full"}),
}


def step(ranks, request, case, **arguments):
    module, model, layout = CASES[case]
    return ranks.run(module, "step", model=request.getfixturevalue(model), layout=layout, **arguments)[0]


def apart(a, b):
    """Return the largest relative difference of a tensor, in the L2 norm, and its name."""
    assert a.keys() == b.keys() and a
    return max((float(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name])), name) for name in b)


def assert_same_step(found, local):
    """Differences that were measured: 2e-6 of a gradient, 2e-6 of a log-probability."""
    assert abs(found["loss"] - local["loss"]) <= 1e-6 * max(1.0, abs(local["loss"]))
    np.testing.assert_allclose(found["logp"], local["logp"], atol=1e-5)
    assert abs(found["grad_norm"] / local["grad_norm"] - 1) < 1e-5
    assert apart(found["grads"], local["grads"]) < (2e-5,)
    assert apart(found["weights"], local["weights"]) < (1e-5,)
    assert found["replicas_differ"] == 0


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_local_layers(te_ranks, two_ranks, request, case):
    assert_same_step(step(te_ranks, request, case), step(two_ranks, request, case))


def test_a_product_that_comes_transposed_fails_the_same_comparison(te_ranks, two_ranks, request):
    wrong = step(te_ranks, request, "dense", sabotage="transposed")
    right = step(two_ranks, request, "dense")
    np.testing.assert_allclose(wrong["logp"], right["logp"], atol=1e-5)  # its forward products are right
    with pytest.raises(AssertionError):
        assert_same_step(wrong, right)
    difference, name = apart(wrong["grads"], right["grads"])
    assert difference > 1 and name.endswith("self_attn.o_proj.weight")


@pytest.mark.parametrize(("case", "products"), [("tp2_sp", {"Linear"}), ("experts", {"Linear", "GroupedLinear"})])
def test_the_layers_are_transformer_engines_and_export_the_names_of_the_folder(te_ranks, request, case, products):
    _, model, layout = CASES[case]
    folder = request.getfixturevalue(model)
    (used, exported), (used_there, _) = te_ranks.run(TE_STEPS, "layers", model=folder, layout=layout)
    assert products | {"LayerNormLinear", "RMSNorm", "DotProductAttention", "FusedAdam"} <= used == used_there
    with safe_open(folder / "model.safetensors", "pt") as stored:
        names = stored.keys()
        assert exported == {name: tuple(stored.get_slice(name).get_shape()) for name in names}


@pytest.mark.parametrize("name", ["quantize", "fused_attn_fwd", "layernorm_fwd", "fused_rope_forward"])
def test_a_compiled_function_without_a_stand_in_raises_its_name(te_ranks, name):
    assert (
        te_ranks.run(TE_STEPS, "call", name=name)
        == [f"transformer_engine_torch.{name} has no stand-in on a CPU (tests/te_cpu/compiled.py)"] * 2
    )


@pytest.mark.parametrize("kind", ["blockwise", "mxfp8"])
def test_a_quantizer_is_made_in_python_and_quantizes_in_compiled_code_alone(te_ranks, kind):
    said = te_ranks.run(TE_STEPS, "quantize", kind=kind)
    assert said == ["transformer_engine_torch.quantize has no stand-in on a CPU (tests/te_cpu/compiled.py)"] * 2


def test_a_micro_batch_goes_to_the_device_in_one_copy_and_no_plan_of_attention_is_made(te_ranks, qwen3):
    """A replica has 3 micro-batches of 192 tokens, or 2 of 384."""
    three, two = (te_ranks.run(TE_STEPS, "copies", model=qwen3, budget=budget)[0] for budget in (192, 384))
    assert three - two == 1

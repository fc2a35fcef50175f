"""A step on Transformer Engine's Python layers equals the step on megatron-core's local layers.

Its compiled functions are plain torch (`compiled.py`). So these tests prove what is passed to Transformer Engine and
what is done with its results, and nothing about its kernels.
"""

import numpy as np
import pytest
from safetensors import safe_open

STEPS, ALP_STEPS, ENGINE_STEPS = "tests.parallel.steps", "tests.parallel.alp_steps", "tests.te_cpu.steps"
CASES = {
    "dense": (STEPS, "qwen3", {"data": 2}),
    "tp2_sp": (STEPS, "qwen3", {"tensor": 2, "sequence": True}),
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


def assert_same_step(engine, local):
    """Differences that were measured: 2e-6 of a gradient, 2e-6 of a log-probability."""
    assert abs(engine["loss"] - local["loss"]) <= 1e-6 * max(1.0, abs(local["loss"]))
    np.testing.assert_allclose(engine["logp"], local["logp"], atol=1e-5)
    assert abs(engine["grad_norm"] / local["grad_norm"] - 1) < 1e-5
    assert apart(engine["grads"], local["grads"]) < (2e-5,)
    assert apart(engine["weights"], local["weights"]) < (1e-5,)
    assert engine["replicas_differ"] == 0


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_local_layers(engine_ranks, two_ranks, request, case):
    assert_same_step(step(engine_ranks, request, case), step(two_ranks, request, case))


def test_a_product_that_comes_transposed_fails_the_same_comparison(engine_ranks, two_ranks, request):
    wrong = step(engine_ranks, request, "dense", sabotage="transposed")
    right = step(two_ranks, request, "dense")
    np.testing.assert_allclose(wrong["logp"], right["logp"], atol=1e-5)  # its forward products are right
    with pytest.raises(AssertionError):
        assert_same_step(wrong, right)
    difference, name = apart(wrong["grads"], right["grads"])
    assert difference > 1 and name.endswith("self_attn.o_proj.weight")


@pytest.mark.parametrize(("case", "products"), [("tp2_sp", {"Linear"}), ("experts", {"Linear", "GroupedLinear"})])
def test_the_layers_are_transformer_engines_and_export_the_names_of_the_folder(engine_ranks, request, case, products):
    _, model, layout = CASES[case]
    folder = request.getfixturevalue(model)
    (used, exported), (used_there, _) = engine_ranks.run(ENGINE_STEPS, "layers", model=folder, layout=layout)
    assert products | {"LayerNormLinear", "RMSNorm", "DotProductAttention", "FusedAdam"} <= used == used_there
    with safe_open(folder / "model.safetensors", "pt") as stored:
        names = stored.keys()
        assert exported == {name: tuple(stored.get_slice(name).get_shape()) for name in names}


@pytest.mark.parametrize("name", ["quantize", "fused_attn_fwd", "layernorm_fwd", "fused_rope_forward"])
def test_a_compiled_function_without_a_stand_in_raises_its_name(engine_ranks, name):
    assert (
        engine_ranks.run(ENGINE_STEPS, "call", name=name)
        == [f"transformer_engine_torch.{name} has no stand-in on a CPU (tests/te_cpu/compiled.py)"] * 2
    )

"""Calls into Transformer Engine bind to its real signatures, and its recipes are those that were asked for."""

SIGNATURES = "tests.te_cpu.signatures"
KINDS = {
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "blockwise pow2": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}


def test_the_calls_of_the_gpu_tests_bind(te_ranks):
    called = te_ranks.run(SIGNATURES, "bind_all")[0]
    quantizers = {"Float8CurrentScalingQuantizer", "Float8BlockQuantizer", "MXFP8Quantizer", "Float8Quantizer"}
    assert quantizers | {"Linear", "autocast"} == set(called)


def test_megatron_core_makes_the_recipe_that_was_asked_for(te_ranks):
    made = te_ranks.run(SIGNATURES, "recipes")[0]
    assert made.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert kind in made[name]["is"], name
    assert (made["blockwise"]["pow2"], made["blockwise pow2"]["pow2"]) == (False, True)

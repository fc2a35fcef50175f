"""A training step with quantized products is the same under every layout that keeps its blocks whole.

In float32, two layouts differ by the order of summation. With quantized products, this order can also move a value to
the next code if it lies on the boundary between two codes. Such a value changes everything computed from it by far
more than rounding does, and which value it is depends on the processor. It is rare: in a batch of a thousand tokens
there are several, in a batch of ten tokens most often none. So layouts that keep the order of summation are compared
on the whole batch. Tensor parallelism sums in another order: it is compared on several short batches. In most of them
the log-probabilities must be the same up to rounding, and the gradients up to a changed code.
"""

import functools

import numpy as np
import pytest

from megatron_rl.precision.plan import DTYPES
from tests.models import make_qwen3
from tests.parallel import precision_steps
from tests.parallel.test_parity import FULL, TWO

STEPS = "tests.parallel.precision_steps"
SAME_ORDER = 1e-6  # largest relative difference where products and sums have one order
# The same where sums have another order: of log-probabilities, and of gradients, where codes change more often.
ROUNDING, CHANGED_CODE = 1e-4, 5e-3
MOST = 4  # of the seven short batches
KINDS = ("fc1", "fc2", "proj", "qkv")
BLOCKWISE, TENSORWISE, MX = {"recipe": "blockwise"}, {"recipe": "tensorwise"}, {"recipe": "mxfp8"}
KEPT = {**BLOCKWISE, "first_last_bf16": True}
TP2_SP_RECOMPUTE = {**TWO["tp2_sp"], **FULL}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return a model whose matrices two ranks split into parts of whole 128 x 128 blocks."""
    folder = tmp_path_factory.mktemp("wide")
    return make_qwen3(folder, tied=False, hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.fixture(scope="module")
def one_rank(wide):
    """Return a function from a `precision` section to the step of one rank, which layouts are compared to."""

    @functools.cache
    def step(**precision):
        return precision_steps.step(wide, {}, precision=precision)

    return step


@pytest.fixture(scope="module")
def short_one_rank(wide):
    """Return a function from a `precision` section to the steps of one rank on the short batches."""

    @functools.cache
    def steps(**precision):
        return precision_steps.short_steps(wide, {}, precision=precision)

    return steps


def difference(result, reference):
    """Return the relative norm of the difference of all gradients, and the largest log-probability difference."""
    assert set(result["grads"]) == set(reference["grads"])
    gap = sum(float(np.square(result["grads"][name] - grad).sum()) for name, grad in reference["grads"].items())
    whole = sum(float(np.square(grad).sum()) for grad in reference["grads"].values())
    return (gap / whole) ** 0.5, float(np.abs(result["logp"] - reference["logp"]).max())


def assert_same_step(result, reference, tolerance):
    grads, logp = difference(result, reference)
    assert grads < tolerance
    assert logp < 10 * tolerance
    assert abs(result["loss"] - reference["loss"]) < tolerance * max(1.0, abs(reference["loss"]))
    assert abs(result["grad_norm"] / reference["grad_norm"] - 1) < tolerance
    assert result["replicas_differ"] == 0.0


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        (BLOCKWISE, TWO["pp2"]),
        (BLOCKWISE, TWO["pp2_vpp2_recompute"]),
        (BLOCKWISE, TWO["dp2"]),
        (TENSORWISE, TWO["pp2_recompute"]),
        (TENSORWISE, TWO["dp2"]),
    ],
    ids=lambda value: "_".join(f"{k}_{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_layouts_make_the_step_of_one_rank(two_ranks, wide, one_rank, precision, layout):
    result = two_ranks.run(STEPS, "step", model=wide, layout=layout, precision=precision)[0]
    assert_same_step(result, one_rank(**precision), SAME_ORDER)


def same_steps(results, references):
    """Return how many steps are the same: log-probabilities up to rounding, gradients up to a changed code."""
    same = 0
    for result, reference in zip(results, references, strict=True):
        assert result["replicas_differ"] == 0.0
        grads, logp = difference(result, reference)
        norm = abs(result["grad_norm"] / reference["grad_norm"] - 1)
        same += grads < CHANGED_CODE and norm < CHANGED_CODE and logp < ROUNDING
    return same


@pytest.mark.parametrize(
    ("precision", "layout"),
    [(BLOCKWISE, TWO["tp2"]), (BLOCKWISE, TP2_SP_RECOMPUTE), (MX, TWO["tp2_sp"])],
    ids=["blockwise-tp2", "blockwise-tp2_sp_recompute", "mxfp8-tp2_sp"],
)
def test_tensor_parallel_layouts_make_the_step_of_one_rank(two_ranks, wide, short_one_rank, precision, layout):
    results = two_ranks.run(STEPS, "short_steps", model=wide, layout=layout, precision=precision)[0]
    assert same_steps(results, short_one_rank(**precision)) >= MOST


@pytest.mark.parametrize("precision", [BLOCKWISE, MX], ids=lambda p: p["recipe"])
def test_no_short_step_without_quantization_is_the_same(short_one_rank, precision):
    assert same_steps(short_one_rank(), short_one_rank(**precision)) == 0


@pytest.mark.parametrize("precision", [BLOCKWISE, TENSORWISE, MX], ids=lambda p: p["recipe"])
def test_the_unquantized_step_fails_the_same_comparison(one_rank, precision):
    with pytest.raises(AssertionError):
        assert_same_step(one_rank(), one_rank(**precision), 5e-3)
    assert difference(one_rank(), one_rank(**precision))[0] > 0.05


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "mxfp8", "nvfp4", "delayed"])
def test_recomputed_layers_make_the_same_step_bit_by_bit(wide, one_rank, recipe):
    result = precision_steps.step(wide, FULL, precision={"recipe": recipe})
    assert difference(result, one_rank(recipe=recipe)) == (0.0, 0.0)


def test_one_scale_a_tensor_is_one_a_part_under_tensor_parallelism_and_of_the_gathered_input_under_sequence_parallelism(
    two_ranks, wide, one_rank
):
    gathered, short = (
        two_ranks.run(STEPS, "short_steps", model=wide, layout=TWO[name], precision=TENSORWISE)[0]
        for name in ("tp2_sp", "tp2")
    )
    assert same_steps(gathered, short) >= MOST
    parts = two_ranks.run(STEPS, "step", model=wide, layout=TWO["tp2"], precision=TENSORWISE)[0]
    assert difference(parts, one_rank(**TENSORWISE))[0] > 0.05
    assert difference(parts, one_rank())[0] < 2 * difference(one_rank(**TENSORWISE), one_rank())[0]


@pytest.mark.parametrize("layout", [TWO["pp2"], TWO["pp2_vpp2"]], ids=["pp2", "pp2_vpp2"])
def test_first_and_last_layer_are_kept_wherever_they_lie(two_ranks, wide, one_rank, layout):
    result = two_ranks.run(STEPS, "step", model=wide, layout=layout, precision=KEPT)[0]
    assert result["quantized"] == [(layer, kind) for layer in (1, 2) for kind in KINDS]
    assert_same_step(result, one_rank(**KEPT), SAME_ORDER)


def test_first_and_last_layer_are_kept_under_tensor_parallelism(two_ranks, wide, one_rank, short_one_rank):
    results = two_ranks.run(STEPS, "short_steps", model=wide, layout=TWO["tp2_sp"], precision=KEPT)[0]
    assert all(result["quantized"] == [(layer, kind) for layer in (1, 2) for kind in KINDS] for result in results)
    assert same_steps(results, short_one_rank(**KEPT)) >= MOST
    assert difference(one_rank(**KEPT), one_rank(**BLOCKWISE))[0] > 0.05


def test_the_record_counts_products_of_every_kind_of_linear(wide, one_rank):
    every, some, none = one_rank(**BLOCKWISE), one_rank(**BLOCKWISE, first_last_bf16=True), one_rank()
    again = precision_steps.step(wide, FULL, precision=BLOCKWISE)
    names = [f"precision/gemms/{kind}" for kind in KINDS]
    microbatches = every["metrics"][names[0]] / (4 * 3)
    assert microbatches >= 2 and microbatches == int(microbatches)
    for name in names:
        assert every["metrics"][name] == 2 * some["metrics"][name] == microbatches * 4 * 3
        assert again["metrics"][name] == microbatches * 4 * 4  # the forward product runs twice
        assert name not in none["metrics"]
    assert every["core_fp8"] is None, "without Transformer Engine megatron-core's own switch would do nothing"


def test_an_update_that_ran_without_a_quantized_product_is_refused_by_every_rank(two_ranks, wide):
    message = (
        r"rank 0: PrecisionError: precision.recipe is blockwise, but .*\(dgrad of fc1, fprop of fc1, wgrad of fc1\)"
    )
    with pytest.raises(RuntimeError, match=message):
        two_ranks.run(STEPS, "step", model=wide, layout=TWO["pp2"], precision=BLOCKWISE, sabotage="plain_on_last_rank")


@pytest.mark.parametrize("train", ["bf16", "fp16"])
def test_sixteen_bit_training_is_quantized_too(two_ranks, wide, one_rank, train):
    section = {**BLOCKWISE, "train": train}
    result = two_ranks.run(STEPS, "step", model=wide, layout=TWO["tp2_sp"], precision=section)[0]
    assert result["quantized"] == one_rank(**BLOCKWISE)["quantized"] and result["dtype"] == DTYPES[train]
    assert result["metrics"]["precision/gemms/fc1"] == 2 * one_rank(**BLOCKWISE)["metrics"]["precision/gemms/fc1"]
    grads, _ = difference(result, one_rank(**BLOCKWISE))
    assert grads < difference(one_rank(**BLOCKWISE), one_rank())[0]


ALP = {"enabled": True, "sigma_init": 0.3}


def test_perturbed_layers_under_tensor_parallelism_make_the_step_of_one_rank(two_ranks, wide):
    sections = {"precision": BLOCKWISE, "alp": ALP}
    results = two_ranks.run(STEPS, "short_steps", model=wide, layout=TP2_SP_RECOMPUTE, **sections)[0]
    assert same_steps(results, precision_steps.short_steps(wide, {}, **sections)) >= MOST


def test_perturbed_layers_are_quantized_and_make_the_step_of_one_rank(two_ranks, wide, one_rank):
    sections = {"precision": BLOCKWISE, "alp": ALP}
    result = two_ranks.run(STEPS, "step", model=wide, layout=TWO["pp2_vpp2_recompute"], **sections)[0]
    reference = precision_steps.step(wide, {}, **sections)
    assert_same_step(result, reference, SAME_ORDER)
    assert reference["quantized"] == one_rank(**BLOCKWISE)["quantized"]
    assert difference(reference, one_rank(**BLOCKWISE))[0] > 0.05


def test_blocks_that_context_parallelism_cuts_elsewhere_fail_the_same_comparison(two_ranks, wide, one_rank):
    """Blocks of weight gradients span 128 tokens of a rank's stream, and a rank holds half of the stream."""
    result = two_ranks.run(STEPS, "step", model=wide, layout=TWO["cp2"], precision=BLOCKWISE)[0]
    assert 0.02 < difference(result, one_rank(**BLOCKWISE))[0] < 0.1


def scales_of_all(ranks):
    """Return the scales of all ranks by name."""
    return {name: scale for rank in ranks for name, scale in rank["scales"].items()}


@pytest.mark.parametrize("layout", [TWO["tp2"], TP2_SP_RECOMPUTE, TWO["pp2"]], ids=["tp2", "tp2_sp_recompute", "pp2"])
def test_delayed_scales_are_agreed_on_and_are_those_of_one_rank(two_ranks, wide, layout):
    runs = zip(*two_ranks.run(STEPS, "short_delayed_runs", model=wide, layout=layout), strict=True)
    same = 0
    for ranks, alone in zip(runs, precision_steps.short_delayed_runs(wide, {}), strict=True):
        if layout.get("tensor"):
            assert ranks[0]["scales"] == ranks[1]["scales"]
        found = scales_of_all(ranks)
        assert found.keys() == alone["scales"].keys() and len(found) == 4 * 4 * 3
        assert all(scale != 1 for name, scale in found.items() if "gradients" not in name)
        assert alone["scored"] == alone["scales"], "scoring moves no scale"
        same += found == pytest.approx(alone["scales"], rel=1e-5)
    assert same >= MOST


def test_a_checkpoint_carries_delayed_scales(two_ranks, wide, tmp_path):
    layout = TWO["pp2"]
    saved = two_ranks.run(STEPS, "save_and_go_on", model=wide, layout=layout, folder=tmp_path)
    loaded = two_ranks.run(STEPS, "load_and_go_on", model=wide, layout=layout, folder=tmp_path)
    assert [rank["scales"] for rank in loaded] == [rank["scales"] for rank in saved]
    without = two_ranks.run(STEPS, "load_and_go_on", model=wide, layout=layout, folder=tmp_path, forget=True)
    same = [
        all(np.array_equal(rank["next"][name], w) for name, w in saved[0]["next"].items())
        for rank in (loaded[0], without[0])
    ]
    assert same == [True, False]

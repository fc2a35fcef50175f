"""Products of quantized linears: their operands, their gradients and the tensors that they save."""

from collections import Counter

import pytest
import torch

from megatron_rl.config import PrecisionConfig
from megatron_rl.precision.delayed import LinearScales
from megatron_rl.precision.formats import amax, quantize
from megatron_rl.precision.products import Operands, QuantizedProducts, Scales, operands_of, transpose_invariant
from tests.policies import embedded_plan

T, K, N = 150, 264, 200  # no dimension is a multiple of a block
RECIPES = {
    "tensorwise": {"recipe": "tensorwise"},
    "tensorwise_hybrid": {"recipe": "tensorwise", "format": "hybrid"},
    "blockwise": {"recipe": "blockwise"},
    "blockwise_pow2": {"recipe": "blockwise", "pow2_scales": True},
    "mxfp8": {"recipe": "mxfp8"},
    "nvfp4": {"recipe": "nvfp4"},
}
EPS = torch.finfo(torch.float32).eps


class Watcher:
    """A watcher that counts products and returns a fixed scale for gradients."""

    def __init__(self, scale=None):
        self.ran, self.scale = Counter(), scale

    def count(self, product):
        self.ran[product] += 1

    def gradient_scale(self, grad_TN):
        return self.scale


def operands(options) -> Operands:
    found = operands_of(embedded_plan(PrecisionConfig(**options), num_layers=4))
    assert found is not None
    return found


def tensors(dtype=torch.float32, seed=0):
    """Return x [T, K], weight [N, K], bias [N] and dY [T, N].

    Magnitudes differ between rows and between columns. dY is as small as in training.
    """
    g = torch.Generator().manual_seed(seed)
    x, weight, grad = (torch.randn(s, generator=g) for s in ((T, K), (N, K), (T, N)))
    x *= torch.rand((T, 1), generator=g).exp2() * 8 ** torch.randn((1, K), generator=g)
    grad *= 1e-4 * 4 ** torch.randn((T, 1), generator=g)
    bias = torch.randn(N, generator=g)
    return tuple(t.to(dtype) for t in (x, 0.02 * weight, bias, grad))


def run(x, weight, bias, grad, chosen, scales=None, watcher=None):
    """Return the output and the gradients of x, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = QuantizedProducts.apply(*leaves, chosen, scales or Scales(), watcher or Watcher())
    out.backward(grad)
    return out.detach(), *(leaf.grad for leaf in leaves)


def rows(x, fmt, **kwargs):
    return quantize(x, fmt, **kwargs).dequantize()


def columns(x, fmt):
    return quantize(x.t(), fmt).dequantize().t()


def assert_product(found, left, right, added=0.0):
    """Assert that found is left @ right + added in fp32, rounded to its dtype.

    A tolerance of 2 eps per summand covers any order of fp32 summation.
    """
    exact = left.double() @ right.double() + added
    magnitude = left.double().abs() @ right.double().abs() + abs(added)
    bound = 2 * EPS * left.shape[1] ** 0.5 * magnitude + torch.finfo(found.dtype).eps / 2 * exact.abs()
    bound += torch.finfo(found.dtype).smallest_normal
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_the_three_products_are_those_of_operands_quantized_along_the_summed_dimension(options, dtype):
    x, weight, bias, grad = tensors(dtype)
    chosen, watcher = operands(options), Watcher()
    out, x_grad, weight_grad, _ = run(x, weight, bias, grad, chosen, watcher=watcher)
    assert {t.dtype for t in (out, x_grad, weight_grad)} == {dtype}
    assert_product(out, rows(x, chosen.inputs), rows(weight, chosen.weights).t(), bias.double())
    assert_product(x_grad, rows(grad, chosen.gradients), columns(weight, chosen.weights))
    assert_product(weight_grad, columns(grad, chosen.gradients).t(), columns(x, chosen.inputs))
    assert watcher.ran == {"fprop": 1, "dgrad": 1, "wgrad": 1}


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_unquantized_products_fail_the_same_comparison(options):
    x, weight, bias, grad = tensors()
    chosen = operands(options)
    with pytest.raises(AssertionError):
        assert_product(x @ weight.t() + bias, rows(x, chosen.inputs), rows(weight, chosen.weights).t(), bias.double())
    with pytest.raises(AssertionError):
        assert_product(grad @ weight, rows(grad, chosen.gradients), columns(weight, chosen.weights))
    with pytest.raises(AssertionError):
        assert_product(grad.t() @ x, columns(grad, chosen.gradients).t(), columns(x, chosen.inputs))


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_quantized_gradients_point_where_the_exact_ones_do(options):
    x, weight, bias, grad = tensors()
    _, x_grad, weight_grad, _ = run(x, weight, bias, grad, operands(options))
    least = 0.95 if options["recipe"] == "nvfp4" else 0.99
    for found, exact in ((x_grad, grad @ weight), (weight_grad, grad.t() @ x)):
        assert least < torch.cosine_similarity(found.flatten(), exact.flatten(), 0) < 1 - 1e-6


@pytest.mark.parametrize("name", ["blockwise", "mxfp8", "nvfp4"])
def test_column_copies_come_from_the_tensor_and_not_from_row_codes(name):
    x, weight, bias, grad = tensors()
    chosen = operands(RECIPES[name])
    assert not transpose_invariant(chosen.inputs) and not transpose_invariant(chosen.gradients)
    weight_grad = run(x, weight, bias, grad, chosen)[2]
    with pytest.raises(AssertionError):
        assert_product(
            weight_grad,
            columns(rows(grad, chosen.gradients), chosen.gradients).t(),
            columns(rows(x, chosen.inputs), chosen.inputs),
        )
    with pytest.raises(AssertionError):
        assert_product(weight_grad, rows(grad, chosen.gradients).t(), rows(x, chosen.inputs))


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_the_gradient_of_the_bias_is_that_of_unquantized_output_gradients(options):
    x, weight, bias, grad = tensors()
    chosen = operands(options)
    found = run(x, weight, bias, grad, chosen)[3]
    torch.testing.assert_close(found, grad.double().sum(0).float(), rtol=1e-5, atol=1e-7 * grad.abs().max().item())
    assert not torch.allclose(found, rows(grad, chosen.gradients).sum(0), rtol=1e-4, atol=0.0)


def test_nvfp4_weights_share_scales_in_squares_so_that_both_products_see_one_weight():
    chosen = operands(RECIPES["nvfp4"])
    weight = tensors()[1]
    assert torch.equal(rows(weight, chosen.weights), columns(weight, chosen.weights))
    assert not torch.equal(rows(weight, chosen.inputs), columns(weight, chosen.inputs))


@pytest.mark.parametrize("name", ["tensorwise", "blockwise", "mxfp8"])
def test_inputs_are_kept_as_codes_of_one_byte_and_the_weight_as_itself(name):
    x, weight, bias, _ = tensors(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        QuantizedProducts.apply(x, weight.requires_grad_(), bias, operands(RECIPES[name]), Scales(), Watcher())
    own = [t for t in kept if t.data_ptr() != weight.data_ptr()]
    assert len(own) < len(kept)
    padded = -(-T // 128) * 128 * K
    assert x.numel() <= sum(t.nbytes for t in own) < 1.1 * padded < x.nbytes


def test_an_input_that_needs_no_gradient_costs_no_product():
    x, weight, bias, grad = tensors()
    watcher = Watcher()
    out = QuantizedProducts.apply(x, weight.requires_grad_(), bias, operands(RECIPES["blockwise"]), Scales(), watcher)
    out.backward(grad)
    assert watcher.ran == {"fprop": 1, "wgrad": 1}


def test_delayed_products_use_the_given_scales():
    x, weight, bias, grad = tensors()
    chosen = operands({"recipe": "delayed", "format": "hybrid"})
    assert chosen.delayed and chosen.gradients.element == torch.float8_e5m2
    given, for_grad = Scales(torch.tensor(3.0), torch.tensor(2000.0)), torch.tensor(5e6)
    out, x_grad, weight_grad, _ = run(x, weight, bias, grad, chosen, given, Watcher(for_grad))
    quantized = (
        rows(x, chosen.inputs, scale=given.inputs),
        rows(weight, chosen.weights, scale=given.weights),
        rows(grad, chosen.gradients, scale=for_grad),
    )
    assert not torch.equal(quantized[0], rows(x, chosen.inputs))
    assert_product(out, quantized[0], quantized[1].t(), bias.double())
    assert_product(x_grad, quantized[2], quantized[1])
    assert_product(weight_grad, quantized[2].t(), quantized[0])


class TestDelayedScales:
    """Delayed scales of one linear over micro-batches in pipeline order: forward, forward, backward, backward."""

    @staticmethod
    def moved_on(scales):
        for scale in (scales.inputs, scales.weights):
            scale.update()
        scales.open = False

    def test_a_pass_uses_the_magnitudes_of_the_one_before_it(self):
        scales = LinearScales(operands({"recipe": "delayed"}), torch.device("cpu"))
        x, weight, _, _ = tensors()
        scales.open = True
        assert scales.forward(x, weight) == Scales(torch.tensor(1.0), torch.tensor(1.0))
        self.moved_on(scales)
        scales.open = True
        second = scales.forward(2 * x, weight)
        assert second.inputs == 448 / amax(x) and second.weights == 448 / amax(weight)
        self.moved_on(scales)
        assert scales.inputs.scale == 448 / amax(2 * x)

    def test_a_recomputation_gets_the_scales_of_its_first_pass_and_is_not_noted_again(self):
        scales = LinearScales(operands({"recipe": "delayed"}), torch.device("cpu"))
        x, weight, _, _ = tensors()
        first = []
        for factor in (1, 2, 3):
            scales.open = True
            with torch.no_grad():  # a checkpointed pass
                first.append(scales.forward(factor * x, weight))
            self.moved_on(scales)
        before = scales.state_dict()
        again = [scales.forward(factor * x, weight) for factor in (1, 2, 3)]
        assert again == first and len({float(one.inputs) for one in first}) == 3
        for name, state in scales.state_dict().items():
            assert all(torch.equal(state[key], before[name][key]) for key in state)

    def test_scoring_is_not_noted(self):
        scales = LinearScales(operands({"recipe": "delayed"}), torch.device("cpu"))
        x, weight, _, _ = tensors()
        with torch.no_grad():
            scales.forward(x, weight)
        assert scales.inputs.newest == 0

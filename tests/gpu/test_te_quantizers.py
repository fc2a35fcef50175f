"""Transformer Engine's codes and scales equal the golden vectors and those of the emulator, bit for bit."""

from collections import Counter

import pytest
import torch

from megatron_rl.config import PrecisionConfig
from megatron_rl.precision.formats import Quantized, amax, quantize
from megatron_rl.precision.products import QuantizedProducts, Scales, operands_of
from tests.gpu import te
from tests.gpu.needs import (
    GOLDEN,
    assert_as_accumulated,
    needs_capability,
    needs_te,
    only_hopper,
    raw,
    relative,
    spread,
    unhex,
)
from tests.policies import embedded_plan

pytestmark = needs_te
POW2 = [False, True]
GOLDEN_X = [1, -2.5, 0.1, 300, -0.0, 7.3, 1e-4, -447]


def assert_same(found: te.Codes, ours: Quantized, transposed: Quantized | None = None) -> None:
    assert torch.equal(raw(found.codes), raw(ours.codes))
    assert torch.equal(found.scale_inv.cpu().reshape(ours.scale_inv.shape), ours.scale_inv.cpu())
    if transposed is not None:
        assert found.codes_t is not None and found.scale_inv_t is not None
        assert torch.equal(raw(found.codes_t), raw(transposed.codes))
        assert torch.equal(found.scale_inv_t.cpu(), transposed.scale_inv.cpu())


# --- golden vectors


@pytest.mark.parametrize("pow2", POW2)
@pytest.mark.parametrize("element", te.ELEMENTS)
def test_current_scaling_gives_the_golden_codes(element, pow2):
    golden = GOLDEN[f"current_{element}_pow2={pow2}"]
    x = torch.zeros(16, 16)
    x[0, :8] = torch.tensor(GOLDEN_X)
    found = te.current(x.cuda(), element, pow2=pow2)
    assert found.scale_inv.item() == float.fromhex(golden["scale_inv_hex"])
    assert raw(found.codes)[0, :8].tolist() == unhex(golden["codes"])


@only_hopper
@pytest.mark.parametrize("pow2", POW2)
def test_blocks_along_a_row_give_the_golden_codes(pow2):
    golden = GOLDEN[f"block1x128_ramp_pow2={pow2}"]
    x = ((torch.arange(128) - 64).float() * 0.37).expand(16, 128).contiguous()
    found = te.blockwise(x.cuda(), "e4m3", square=False, pow2=pow2)
    assert found.scale_inv.cpu().flatten().tolist() == [float.fromhex(golden["scale_inv_hex"])] * 16
    row = raw(found.codes)[0].tolist()
    assert row[:8] == unhex(golden["codes_first8"]) and row[-8:] == unhex(golden["codes_last8"])
    assert sum(row) == golden["sum_codes"]


@only_hopper
@pytest.mark.parametrize("pow2", POW2)
def test_square_blocks_give_the_golden_codes(pow2):
    golden = GOLDEN["block128_pow2" if pow2 else "block128_f32"]
    w = ((torch.arange(256 * 256) % 509).float() - 254).mul(0.013).reshape(256, 256)
    w[:128, 128:] = 0
    found = te.blockwise(w.cuda(), "e4m3", square=True, pow2=pow2)
    assert found.scale_inv.cpu().flatten().tolist() == [float.fromhex(value) for value in golden["scale_inv"]]
    assert int(raw(found.codes).sum(dtype=torch.int64)) == golden["sum_codes"]


@needs_capability(10)
@pytest.mark.parametrize(("name", "first"), [("mx_amax448", 448.0), ("mx_amax449", 449.0)])
def test_micro_scales_give_the_golden_codes(name, first):
    x = torch.zeros(32, 32)
    x[0, :8] = torch.tensor([first, 1, -3.3, 0.02, 100, -200, 17, 19])
    found = te.mxfp8(x.cuda(), "e4m3")
    assert raw(found.codes)[0, :8].tolist() == unhex(GOLDEN[name]["codes"])
    assert raw(found.scale_inv)[0, 0].item() == unhex(GOLDEN[name]["e"])[0]


# --- the emulator, on cases that the golden vectors do not cover


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("element", te.ELEMENTS)
def test_a_scale_per_tensor_is_the_emulators(element, dtype):
    x = spread(256, 336, dtype)
    assert_same(te.current(x.cuda(), element, pow2=False), quantize(x, f"fp8_tensor_{element}"))
    scale = torch.tensor(0.75)
    found, noted = te.delayed(x.cuda(), element, scale)
    assert_same(found, quantize(x, f"fp8_tensor_{element}", scale=scale))
    assert noted.item() == amax(x).item()


@only_hopper
@pytest.mark.parametrize("shape", [(128, 128), (256, 1024), (304, 272)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("element", te.ELEMENTS)
@pytest.mark.parametrize("pow2", POW2)
@pytest.mark.parametrize("square", [False, True], ids=["1x128", "128x128"])
def test_block_scales_are_the_emulators_by_rows_and_by_columns(shape, dtype, element, pow2, square):
    x = spread(*shape, dtype)
    x[:128, :128] = 0
    name = f"fp8_{'128x128' if square else '1x128'}_{element}{'_pow2' * pow2}"
    assert_same(te.blockwise(x.cuda(), element, square=square, pow2=pow2), quantize(x, name), quantize(x.t(), name))


@needs_capability(10)
@pytest.mark.parametrize("element", te.ELEMENTS)
def test_micro_scales_are_the_emulators(element):
    x = spread(128, 256, torch.bfloat16, tile=32)
    assert_same(te.mxfp8(x.cuda(), element), quantize(x, f"mxfp8_{element}"))


# --- one linear


class Unwatched:
    """A watcher that counts the products of `QuantizedProducts` and gives no scale."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def count(self, product: str) -> None:
        self.ran[product] += 1

    def gradient_scale(self, grad: torch.Tensor) -> None:
        return None


@only_hopper
@pytest.mark.parametrize("form", ["e4m3", "hybrid"])
@pytest.mark.parametrize("pow2", POW2)
def test_a_block_scaled_linear_has_the_emulated_products(form, pow2):
    """The output and both gradients agree with the emulation."""
    x, w = spread(256, 512, torch.bfloat16, seed=1).cuda(), (0.02 * spread(384, 512, seed=2)).bfloat16().cuda()
    grad = spread(256, 384, torch.bfloat16, seed=3).cuda()
    plan = embedded_plan(PrecisionConfig(train="bf16", recipe="blockwise", format=form, pow2_scales=pow2), 1)
    operands, watcher = operands_of(plan), Unwatched()
    ours_x, ours_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    ours = QuantizedProducts.apply(ours_x, ours_w, None, operands, Scales(), watcher)
    ours.backward(grad)
    module, their_x = te.linear(512, 384, w), x.clone().requires_grad_()
    with te.autocast(te.block_recipe(pow2=pow2, hybrid=form == "hybrid")):
        theirs = module(their_x)
    theirs.backward(grad)
    assert watcher.ran == {"fprop": 1, "dgrad": 1, "wgrad": 1}
    assert_as_accumulated(theirs, quantize(x, operands.inputs).dequantize(), quantize(w, operands.weights).dequantize())
    # Both round to bfloat16 once, so elements differ by at most 2^-8. Unquantized products differ by about 3 %.
    for found, expected in ((theirs, ours), (their_x.grad, ours_x.grad), (module.weight.grad, ours_w.grad)):
        assert relative(found.detach().cpu(), expected.detach().cpu()) < 4e-3
    assert relative((x @ w.t()).cpu(), ours.detach().cpu()) > 1e-2

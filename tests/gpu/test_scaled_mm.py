"""The emulation agrees with the hardware: torch's own FP8 products run on the emulator's codes and scales."""

import pytest
import torch

from megatron_rl.precision.formats import FORMATS, quantize
from megatron_rl.precision.tensor_cores import MODES, missing_feature, operands, scaled_mm
from tests.gpu.needs import assert_as_accumulated, needs_capability, needs_cuda, only_hopper, raw, spread

SHAPES = [(128, 256, 128), (256, 384, 640), (512, 128, 2048)]
EVERYWHERE = [pytest.param(mode, marks=needs_capability(8, 9)) for mode in ("TensorWise", "RowWise")]
HOPPER = [pytest.param(mode, marks=only_hopper) for mode in ("BlockWise1x128", "BlockWise128x128")]


@pytest.mark.parametrize("mode", EVERYWHERE + HOPPER)
@pytest.mark.parametrize(("rows", "outputs", "inner"), SHAPES)
def test_a_product_on_tensor_cores_is_the_emulated_one_up_to_accumulation(mode, rows, outputs, inner):
    x, w = spread(rows, inner, seed=1).cuda(), 0.02 * spread(outputs, inner, seed=2).cuda()
    a, b = operands(x, w, mode)
    assert_as_accumulated(scaled_mm(a, b, mode), a.dequantize(), b.dequantize())


@pytest.mark.parametrize("mode", HOPPER)
def test_a_scale_in_the_wrong_place_would_be_seen(mode):
    x, w = spread(256, 512, seed=1).cuda(), 0.02 * spread(256, 512, seed=2).cuda()
    a, b = operands(x, w, mode)
    product = scaled_mm(a, b, mode)
    b.scale_inv.copy_(b.scale_inv.flip(1))
    with pytest.raises(AssertionError, match="elements are off"):
        assert_as_accumulated(product, a.dequantize(), b.dequantize())


@only_hopper
@pytest.mark.parametrize("mode", MODES)
def test_the_doctor_finds_every_mode_on_hopper(mode):
    assert missing_feature(mode, torch.device("cuda")) is None


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_scales_made_on_a_gpu_are_those_made_on_a_cpu(name, dtype):
    x = spread(200, 300, dtype, seed=3)
    x[7] = 0
    here, there = quantize(x, name), quantize(x.cuda(), name)
    assert torch.equal(raw(here.codes), raw(there.codes))
    assert torch.equal(raw(here.scale_inv.reshape(-1)), raw(there.scale_inv.reshape(-1)))
    assert torch.equal(here.dequantize(), there.dequantize().cpu())


@needs_cuda
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8_channel"])
def test_casts_saturate_on_a_gpu_as_on_a_cpu(name):
    x = torch.full((16, 128), float("inf"))
    x[:, ::2] = torch.linspace(-1e30, 1e30, 64)
    assert torch.equal(raw(quantize(x, name).codes), raw(quantize(x.cuda(), name).codes))

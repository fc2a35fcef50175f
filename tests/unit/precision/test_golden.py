"""Number formats of low precision equal golden vectors of Transformer Engine, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.precision import fp4
from megatron_rl.precision.formats import DelayedScale, amax, quantize
from megatron_rl.precision.scales import FP32_MAX, e8m0_of_amax, scale_of_amax

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "fp8_golden.json").read_text())
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def raw(codes: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, flat, because FP8 tensors cannot be compared directly."""
    return codes.contiguous().reshape(-1).view(torch.uint8)


def bytes_of(codes: torch.Tensor) -> list[int]:
    return raw(codes).tolist()


def unhex(codes: list[str]) -> list[int]:
    return [int(code, 16) for code in codes]


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("pow2", [False, True])
def test_current_scaling_gives_the_golden_scale_and_codes(element, pow2):
    golden = GOLDEN[f"current_{element}_pow2={pow2}"]
    x = torch.tensor([[1, -2.5, 0.1, 300, -0.0, 7.3, 1e-4, -447]])
    assert amax(x).item() == golden["amax"]
    assert scale_of_amax(amax(x), LARGEST[element], pow2=pow2).item() == float.fromhex(golden["scale_hex"])
    quantized = quantize(x, f"fp8_tensor_{element}{'_pow2' * pow2}")
    assert quantized.scale_inv.item() == float.fromhex(golden["scale_inv_hex"])
    assert bytes_of(quantized.codes) == unhex(golden["codes"])


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("row", range(15))
def test_the_scale_of_an_amax_is_the_golden_one(element, row):
    peak, plain, pow2 = GOLDEN[f"scale_table_{element}"][row]
    assert scale_of_amax(torch.tensor(peak), LARGEST[element]).item() == plain
    assert scale_of_amax(torch.tensor(peak), LARGEST[element], pow2=True).item() == pow2


def test_the_scale_table_has_no_row_the_tests_leave_out():
    assert len(GOLDEN["scale_table_e4m3"]) == len(GOLDEN["scale_table_e5m2"]) == 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tiny_block_takes_the_largest_scale_of_its_own_dtype(dtype):
    x = torch.full((1, 128), 1e-38, dtype=dtype)
    wanted = GOLDEN["scale_bf16_blockwise_tiny"] if dtype == torch.bfloat16 else FP32_MAX
    assert quantize(x, "fp8_1x128_e4m3").scale_inv.item() == float(np.float32(1) / np.float32(wanted))
    assert quantize(x, "fp8_tensor_e4m3").scale_inv.item() == float(np.float32(1) / np.float32(FP32_MAX))


def test_delayed_scaling_over_a_history_follows_the_golden_steps():
    state = DelayedScale(448.0, history=4, algorithm="max")
    for peak, used, after, history in GOLDEN["delayed_hist4_max"]:
        assert state.scale.item() == used
        state.observe(torch.tensor(peak))
        state.update()
        assert state.scale.item() == after
        assert state.history.tolist() == history


def test_delayed_scaling_on_the_newest_step_with_margin_follows_the_golden_steps():
    state = DelayedScale(448.0, history=1, margin=1)
    for peak, used, after in GOLDEN["delayed_hist1_recent_margin1"]:
        assert state.scale.item() == used
        state.observe(torch.tensor(peak))
        state.update()
        assert state.scale.item() == after


@pytest.mark.parametrize("pow2", [False, True])
def test_a_ramp_in_one_row_block_gives_the_golden_codes(pow2):
    golden = GOLDEN[f"block1x128_ramp_pow2={pow2}"]
    x = ((torch.arange(128) - 64).float() * 0.37)[None]
    quantized = quantize(x, f"fp8_1x128_e4m3{'_pow2' * pow2}")
    codes = bytes_of(quantized.codes)
    assert amax(x).item() == golden["amax"]
    assert quantized.scale_inv.tolist() == [[float.fromhex(golden["scale_inv_hex"])]]
    assert codes[:8] == unhex(golden["codes_first8"])
    assert codes[-8:] == unhex(golden["codes_last8"])
    assert sum(codes) == golden["sum_codes"]


@pytest.mark.parametrize(
    ("key", "name"), [("block128_pow2", "fp8_128x128_e4m3_pow2"), ("block128_f32", "fp8_128x128_e4m3")]
)
def test_four_square_blocks_one_of_them_zero_give_the_golden_codes(key, name):
    w = ((torch.arange(256 * 256) % 509 - 254).float() * 0.013).view(256, 256)
    w[:128, 128:] = 0
    quantized = quantize(w, name)
    assert quantized.scale_inv.flatten().tolist() == [float.fromhex(value) for value in GOLDEN[key]["scale_inv"]]
    assert sum(bytes_of(quantized.codes)) == GOLDEN[key]["sum_codes"]


@pytest.mark.parametrize("peak", [448, 449])
def test_an_mx_block_gives_the_golden_exponent_and_codes(peak):
    golden = GOLDEN[f"mx_amax{peak}"]
    x = torch.zeros(1, 32)
    x[0, :8] = torch.tensor([peak, 1, -3.3, 0.02, 100, -200, 17, 19])
    quantized = quantize(x, "mxfp8_e4m3")
    assert bytes_of(quantized.scale_inv) == unhex(golden["e"])
    assert bytes_of(quantized.codes)[:8] == unhex(golden["codes"])


@pytest.mark.parametrize(("peak", "exponent"), GOLDEN["mx_e8m0_of_amax"])
def test_the_e8m0_exponent_of_an_amax_is_the_golden_one(peak, exponent):
    assert e8m0_of_amax(torch.tensor(peak), 448.0).item() == exponent


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_the_mx_reciprocal_is_the_golden_one(element):
    assert float(np.float32(1.0 / LARGEST[element])) == float.fromhex(GOLDEN["mx_rcp"][element])


@pytest.mark.parametrize("largest", [448.0, 57344.0])
def test_an_mx_amax_at_the_end_of_the_range_gives_its_power_exactly(largest):
    powers = torch.arange(-100, 100)
    assert e8m0_of_amax(torch.tensor(largest) * 2.0 ** powers.float(), largest).tolist() == (powers + 127).tolist()


def test_the_largest_finite_e8m0_exponent_is_not_rounded_past():
    assert e8m0_of_amax(torch.tensor(3.4e38), 1.0).item() == 254


def test_an_nvfp4_row_gives_the_golden_scales_and_codes():
    golden = GOLDEN["nvfp4"]
    first = [6, 0.25, 0.26, 0.75, -0.75, 1.25, 1.3, -1.75, 2.5, 2.6, 3.5, -5, 5.1, 0, -0.0, -0.1]
    x = torch.cat([torch.tensor(first), torch.arange(16).float() * 0.01])[None]
    quantized = quantize(x, "nvfp4")
    codes = fp4.unpack_nibbles(quantized.codes, 32).flatten().tolist()
    assert amax(x).item() == golden["global_amax"]
    assert bytes_of(quantized.scale_inv) == unhex(golden["blockscale_e4m3"])
    assert [codes[i] for i in range(32) if i != 14] == [
        golden["codes"][i] for i in range(32) if i != 14
    ]  # -0.0: see fp4
    assert quantized.codes[0, 0].item() == codes[0] | codes[1] << 4

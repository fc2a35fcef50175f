"""Number formats of low precision equal an oracle that does not use torch's casts, and obey general laws."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.errors import PrecisionError
from megatron_rl.precision import formats, fp4
from megatron_rl.precision.formats import FORMATS, DelayedScale, fake_quantize, find_format, quantize
from megatron_rl.precision.scales import e8m0_reciprocal, e8m0_value, scale_of_amax

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FLOATS = [name for name in FORMATS if name != "int8_channel"]
EIGHT_BITS = [name for name in FLOATS if not name.startswith("nvfp4")]


def raw(codes: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, flat, because FP8 tensors cannot be compared directly."""
    return codes.contiguous().reshape(-1).view(torch.uint8)


def bytes_of(codes: torch.Tensor) -> list[int]:
    return raw(codes).tolist()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if both are equal bit for bit, including the sign of zero. Any NaN equals any other NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    a, b = a.contiguous(), b.contiguous()
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


# --- casts against an oracle that does not use torch's casts


def oracle_round(y: np.ndarray, mantissa: int, least: int, largest: float) -> np.ndarray:
    """Round float64 to nearest even: `mantissa` bits, subnormal below 2^least, saturated at `largest`."""
    _, exponent = np.frexp(y)
    quantum = np.ldexp(1.0, np.maximum(exponent - 1, least) - mantissa)
    with np.errstate(invalid="ignore"):
        return np.clip(np.rint(y / quantum) * quantum, -largest, largest)


def oracle_codes(y: np.ndarray, mantissa: int, least: int, largest: float) -> np.ndarray:
    """Return the codes of the rounded values by the definition: sign bit, exponent field, mantissa field."""
    magnitude = np.abs(oracle_round(y, mantissa, least, largest))
    exponent = np.where(magnitude == 0, least, np.maximum(np.frexp(magnitude)[1] - 1, least))
    units = (magnitude / np.ldexp(1.0, exponent - mantissa)).astype(np.int64)  # hidden bit included where normal
    return (np.signbit(y).astype(np.int64) << 7) + ((exponent - least) << mantissa) + units


ELEMENTS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}


def every_bf16() -> torch.Tensor:
    return torch.arange(65536).to(torch.uint16).view(torch.bfloat16)[None]


def many_fp32() -> torch.Tensor:
    """Return random bit patterns, and numbers in the range of the formats, including ties and their neighbors."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    coarse = torch.randint(-1024, 1024, (100_000,), generator=generator).float()
    ties = torch.ldexp(coarse, torch.randint(-24, 8, (100_000,), generator=generator))
    up, down = torch.nextafter(ties, torch.tensor(torch.inf)), torch.nextafter(ties, torch.tensor(-torch.inf))
    return torch.cat([bits, ties, up, down])[None]


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("values", [every_bf16, many_fp32])
def test_codes_equal_those_of_the_oracle(element, values):
    x = values()
    codes = quantize(x, f"fp8_tensor_{element}", scale=torch.tensor(1.0)).codes
    nan = x.isnan()
    assert bool(codes.float().isnan()[nan].all())
    finite = x[~nan].float().double().numpy()
    wanted = oracle_codes(np.clip(finite, -1e30, 1e30), *ELEMENTS[element])
    assert torch.equal(codes.view(torch.uint8)[~nan].long(), torch.from_numpy(wanted))


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("values", [every_bf16, many_fp32])
def test_values_of_fake_quantization_equal_those_of_the_oracle(element, values):
    x = values()
    found = fake_quantize(x, f"fp8_tensor_{element}", torch.float32, scale=torch.tensor(1.0))
    assert torch.equal(found.isnan(), x.isnan())
    finite = x[~x.isnan()].float().double().numpy()
    wanted = oracle_round(np.clip(finite, -1e30, 1e30), *ELEMENTS[element])
    assert torch.equal(found[~x.isnan()], torch.from_numpy(wanted).float())


def test_e2m1_codes_are_the_nearest_values_and_ties_go_to_even_codes():
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    middle = torch.tensor([(a + b) / 2 for a, b in pairwise(values)])
    around = torch.cat([middle, torch.nextafter(middle, torch.tensor(9.0)), torch.nextafter(middle, torch.tensor(0.0))])
    y = torch.cat([around, torch.linspace(0, 6, 1201), torch.tensor(values)])
    wanted = [min(range(8), key=lambda code: (abs(v - values[code]), code % 2)) for v in y.tolist()]
    assert fp4.encode_e2m1(fp4.round_(y.clone())).tolist() == wanted
    assert fp4.encode_e2m1(fp4.round_(-y[y > 0])).tolist() == [
        code + 8 for code, v in zip(wanted, y.tolist(), strict=True) if v > 0
    ]
    assert torch.equal(
        fp4.decode_e2m1(torch.arange(16).to(torch.uint8)), torch.tensor([*values, *(-v for v in values)])
    )


def test_e8m0_bytes_are_powers_of_two_and_their_reciprocals():
    e = torch.arange(255).to(torch.uint8)
    assert e8m0_value(e).tolist() == [2.0 ** (i - 127) for i in range(255)]
    assert e8m0_reciprocal(e).tolist() == [2.0 ** (127 - i) for i in range(255)]
    nan = torch.tensor([255], dtype=torch.uint8)
    assert math.isnan(e8m0_value(nan).item())
    assert math.isnan(e8m0_reciprocal(nan).item())


# --- laws, on generated matrices


@st.composite
def matrices(draw, largest_exponent: int = 30, special: bool = True) -> torch.Tensor:
    """Draw a matrix [M, N] of any dtype.

    Its shape is not a multiple of any tile. Rows have very different magnitudes. It may hold zeros, and if `special`
    also denormals, inf and NaN.
    """
    rows, columns = draw(st.integers(1, 150)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(rows, columns, generator=generator)
    x = torch.ldexp(
        x, torch.randint(-6, 6, (rows, 1), generator=generator) + draw(st.integers(-30, largest_exponent - 10))
    )
    oddities = [0.0, -0.0] + ([1e-40, -1e-45, 1e-38, math.inf, -math.inf, math.nan, 3e38] if special else [])
    for oddity in draw(st.lists(st.sampled_from(oddities), max_size=4)):
        x[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = oddity
    if draw(st.booleans()):
        x[draw(st.integers(0, rows - 1))] = 0
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = x.to(dtype)
    return x.t() if draw(st.booleans()) else x


LAWS = settings(max_examples=40, deadline=None)


@LAWS
@given(x=matrices(), name=st.sampled_from(FLOATS), dtype=st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_fake_quantization_is_quantize_then_dequantize_bit_for_bit(x, name, dtype):
    assert same(fake_quantize(x, name, dtype), quantize(x, name).dequantize(dtype or x.dtype))


@LAWS
@given(x=matrices(special=False), dtype=st.sampled_from([None, torch.float32, torch.bfloat16]))
def test_fake_quantization_to_int8_is_quantize_then_dequantize_bit_for_bit(x, dtype):
    if bool(x.isfinite().all()):
        assert same(fake_quantize(x, "int8_channel", dtype), quantize(x, "int8_channel").dequantize(dtype or x.dtype))


@LAWS
@given(x=matrices(), name=st.sampled_from(FLOATS))
def test_strides_do_not_matter_and_neither_does_the_input_change(x, name):
    before = x.clone()
    strided, dense = quantize(x, name), quantize(x.contiguous(), name)
    assert torch.equal(raw(strided.codes), raw(dense.codes))
    assert torch.equal(raw(strided.scale_inv), raw(dense.scale_inv))
    fake_quantize(x, name)
    assert same(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_strips_of_a_large_matrix_have_the_codes_and_scales_of_the_whole(monkeypatch, name, dtype):
    x = torch.randn(391, 273, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[130, 5], x[260:, 100:] = 300.0, 0.0
    whole = quantize(x, name)
    monkeypatch.setattr(formats, "_WHOLE", 0)
    monkeypatch.setattr(formats, "_STRIP", 1)
    parts = []
    quantize_whole = formats._quantize
    monkeypatch.setattr(formats, "_quantize", lambda *args: parts.append(len(args[0])) or quantize_whole(*args))
    strips = quantize(x, name)
    assert (len(parts) > 1) == (FORMATS[name].kind in ("block", "mx", "channel")) and sum(parts) == len(x)
    assert strips.shape == whole.shape and torch.equal(raw(strips.codes), raw(whole.codes))
    assert torch.equal(raw(strips.scale_inv), raw(whole.scale_inv))
    assert strips.scale_inv.shape == whole.scale_inv.shape and same(strips.dequantize(), whole.dequantize())


@LAWS
@given(x=matrices(), name=st.sampled_from([name for name in FORMATS if FORMATS[name].kind == "block"]))
def test_a_tile_has_the_codes_and_scale_it_would_have_alone(x, name):
    fmt = FORMATS[name]
    rows, columns = fmt.block
    quantized = quantize(x, name)
    for down in range(quantized.scale_inv.shape[0])[::31]:
        for across in range(quantized.scale_inv.shape[1])[:2]:
            where = slice(down * rows, (down + 1) * rows), slice(across * columns, (across + 1) * columns)
            alone = quantize(x[where], name)
            assert torch.equal(raw(alone.codes), raw(quantized.codes[where]))
            assert torch.equal(alone.scale_inv.flatten(), quantized.scale_inv[down, across].reshape(1))


@LAWS
@given(x=matrices(special=False), name=st.sampled_from(EIGHT_BITS))
def test_the_error_is_at_most_half_a_step_of_the_element_at_its_scale(x, name):
    fmt = FORMATS[name]
    if not bool(x.isfinite().all()):
        return
    back = quantize(x, name).dequantize().double()
    inverse = (
        quantize(torch.ones_like(x) * x.float().abs().max().item(), name) if fmt.kind == "tensor" else quantize(x, name)
    )
    factor = e8m0_value(inverse.scale_inv) if fmt.kind == "mx" else inverse.scale_inv
    if fmt.block is not None:
        factor = factor.repeat_interleave(fmt.block[0], 0)[: x.shape[0]].repeat_interleave(fmt.block[1], 1)[
            :, : x.shape[1]
        ]
    mantissa, least, _ = ELEMENTS[name.removesuffix("_pow2")[-4:]]
    scaled = x.double() / factor.double()
    step = 2.0 ** (torch.clamp(torch.frexp(scaled)[1] - 1, min=least) - mantissa).double()
    bound = 0.5 * step * factor.double() * (1 + 2**-18) + 2**-20 * x.double().abs()
    assert bool(((x.double() - back).abs() <= bound).all())


@LAWS
@given(x=matrices(special=False))
def test_the_error_of_int8_is_at_most_half_a_step_of_its_row(x):
    if not bool(x.isfinite().all()):
        return
    quantized = quantize(x, "int8_channel")
    error = (x.double() - quantized.dequantize().double()).abs()
    # A code is at most 127 steps, and fp32 rounds the scale, the quotient and the product by half a unit each.
    rounding = 3 * 127 * 2.0**-24
    assert bool((error <= (0.5 + rounding) * quantized.scale_inv.double()).all())
    assert int(quantized.codes.int().abs().max()) <= 127


POWERS = [name for name in FORMATS if FORMATS[name].pow2]
OTHERS = [name for name in EIGHT_BITS if not FORMATS[name].pow2]


@LAWS
@given(x=matrices(), name=st.sampled_from(POWERS))
def test_with_scales_of_powers_of_two_quantized_values_quantize_to_themselves(x, name):
    once = fake_quantize(x, name, torch.float32)
    assert same(fake_quantize(once, name, torch.float32), once)


@LAWS
@given(x=matrices(special=False), name=st.sampled_from(OTHERS))
def test_with_other_scales_quantized_values_quantize_to_the_same_codes(x, name):
    x = x.nan_to_num(0, 0, 0)
    quantized = quantize(x.float(), name)
    assert torch.equal(raw(quantize(quantized.dequantize(), name).codes), raw(quantized.codes))


@LAWS
@given(x=matrices(special=False, largest_exponent=12), name=st.sampled_from([name for name in POWERS if "128" in name]))
def test_codes_of_power_of_two_blocks_survive_a_round_trip_through_bf16(x, name):
    x = x.float().nan_to_num(0, 0, 0)
    quantized = quantize(x, name)
    again = quantize(quantized.dequantize(torch.bfloat16), name)
    # If bf16 rounds the amax of a block down to a power of two times the range, the block gets the next scale. Its
    # values are then the same, but its codes differ.
    assert same(again.dequantize(), quantized.dequantize())
    kept = again.scale_inv == quantized.scale_inv
    assert bool(kept.any()) or x.abs().max() == 0 or quantized.scale_inv.numel() < 8


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_zeros_stays_zeros(name, dtype):
    x = torch.zeros(130, 70, dtype=dtype)
    quantized = quantize(x, name)
    assert torch.equal(quantized.dequantize(dtype), x)
    assert set(bytes_of(quantized.codes)) == {0}


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_nan_survives_and_leaves_the_scale_of_its_neighbors(name):
    x = torch.linspace(-3, 3, 256).view(1, 256)
    clean = quantize(x, name)
    x[0, 7] = math.nan
    dirty = quantize(x, name)
    assert dirty.dequantize()[0].isnan().nonzero().flatten().tolist() == [7]
    assert bytes_of(dirty.scale_inv) == bytes_of(clean.scale_inv)
    assert [*bytes_of(dirty.codes)[:7], *bytes_of(dirty.codes)[8:]] == [
        *bytes_of(clean.codes)[:7],
        *bytes_of(clean.codes)[8:],
    ]


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_infinity_saturates(name):
    x = torch.ones(1, 128)
    x[0, 0], x[0, 1] = math.inf, -math.inf
    back = quantize(x, name).codes.float()[0]
    assert back[:2].tolist() == [FORMATS[name].max, -FORMATS[name].max]
    if FORMATS[name].kind != "mx":  # for mx the largest exponent times the largest element overflows fp32
        assert bool(quantize(x, name).dequantize().isfinite().all())


def test_a_nan_in_nvfp4_becomes_the_largest_value_as_in_the_hardware_cast():
    x = torch.ones(1, 16)
    x[0, 3] = math.nan
    assert fp4.unpack_nibbles(quantize(x, "nvfp4").codes, 16)[0].tolist() == [7] * 16


@pytest.mark.parametrize("name, alone", [("nvfp4_token", True), ("nvfp4", False)])
def test_a_row_of_nvfp4_token_does_not_depend_on_the_other_rows(name, alone):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [3], [0.1], [50], [7]])
    whole = fake_quantize(x, name)
    rows = torch.cat([fake_quantize(row[None], name) for row in x])
    assert torch.equal(whole, rows) == alone
    assert torch.equal(fake_quantize(x.t().contiguous().t(), name), whole)
    assert torch.equal(rows, torch.cat([fake_quantize(row[None], "nvfp4") for row in x]))


def test_an_infinite_amax_leaves_nvfp4_finite():
    x = torch.ones(1, 32)
    x[0, 0] = math.inf
    back = quantize(x, "nvfp4").dequantize()
    assert bool(back.isfinite().all())
    assert back[0, 0] == 2688  # the largest E4M3 scale (448) times 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_int8_refuses_what_it_has_no_code_for(value):
    x = torch.ones(2, 4)
    x[1, 2] = value
    for function in (quantize, fake_quantize):
        with pytest.raises(PrecisionError, match="int8_channel has no code for NaN or inf"):
            function(x, "int8_channel")


def test_int8_rounds_halves_to_even_and_reaches_127_on_each_row():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5], [1.0, -1.0, 0.5, 0.0, 0.25], [0.0] * 5])
    quantized = quantize(x, "int8_channel")
    assert quantized.codes.tolist() == [[127, 0, 2, -2, 126], [127, -127, 64, 0, 32], [0] * 5]
    assert quantized.scale_inv.shape == (3, 1)
    assert quantized.scale_inv[0].item() == 1


# --- shapes, states and refusals


@pytest.mark.parametrize(
    ("name", "codes", "scales"),
    [
        ("fp8_tensor_e4m3", (130, 301), ()),
        ("fp8_1x128_e4m3", (130, 301), (130, 3)),
        ("fp8_128x128_e4m3", (130, 301), (2, 3)),
        ("mxfp8_e5m2", (130, 301), (130, 10)),
        ("nvfp4", (130, 151), (130, 19)),
        ("int8_channel", (130, 301), (130, 1)),
    ],
)
def test_shapes_of_a_ragged_matrix(name, codes, scales):
    quantized = quantize(torch.randn(130, 301), name)
    assert quantized.codes.shape == codes
    assert quantized.scale_inv.shape == scales
    assert quantized.codes.is_contiguous()
    assert quantized.codes.dtype == FORMATS[name].element
    assert quantized.dequantize().shape == (130, 301)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_matrix_is_quantized_to_nothing(name, shape):
    assert quantize(torch.zeros(shape), name).dequantize().shape == shape
    assert fake_quantize(torch.zeros(shape), name).shape == shape


def test_a_given_scale_is_the_one_used():
    x = torch.tensor([[1.0, 500.0]])
    quantized = quantize(x, "fp8_tensor_e4m3", scale=torch.tensor(2.0))
    assert quantized.scale_inv.item() == 0.5
    assert quantized.dequantize().tolist() == [[1.0, 224.0]]


def test_eps_is_the_least_amax_that_counts():
    x = torch.full((1, 128), 1e-12)
    assert quantize(x, "fp8_1x128_e4m3", eps=1e-10).scale_inv.item() == pytest.approx(1e-10 / 448, rel=1e-6)
    assert quantize(x, "fp8_1x128_e4m3").scale_inv.item() == pytest.approx(1e-12 / 448, rel=1e-6)
    assert scale_of_amax(torch.tensor(0.0), 448.0, eps=0.5).item() == 896


def test_delayed_scaling_keeps_the_largest_of_a_step_and_resumes_from_its_state():
    state = DelayedScale(448.0, history=3, algorithm="max")
    for peak in (2.0, 7.0, 3.0):
        state.observe(torch.tensor(peak))
    assert state.newest.item() == 7
    state.update()
    other = DelayedScale(448.0, history=3, algorithm="max")
    other.load_state_dict(state.state_dict())
    for one in (state, other):
        one.observe(torch.tensor(14.0))
        one.update()
    assert other.scale.item() == state.scale.item() == 32
    assert other.history.tolist() == state.history.tolist()
    with pytest.raises(PrecisionError, match="3 steps, this one 2"):
        DelayedScale(448.0, history=2).load_state_dict(state.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"), [({"history": 0}, "at least 1"), ({"algorithm": "mean"}, "most_recent")]
)
def test_delayed_scaling_refuses_what_it_cannot_do(arguments, message):
    with pytest.raises(PrecisionError, match=message):
        DelayedScale(448.0, **arguments)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("mxfp8", "mxfp8_e"),
        ("fp8_128x128", "fp8_128x128_e"),
        ("fp8_1x128_e4m3_pow", "fp8_1x128_e4m3_pow2"),
        ("int8", "int8_channel"),
    ],
)
def test_an_unknown_format_is_refused_with_the_nearest_name(wrong, near):
    with pytest.raises(PrecisionError, match=f"unknown number format '{wrong}'; did you mean '{near}"):
        find_format(wrong)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"got shape \[4\]"),
        (torch.zeros(2, 3, 4), r"got shape \[2, 3, 4\]"),
        (torch.zeros(2, 2, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(2, 2, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_other_ranks_and_dtypes_are_refused(x, message):
    for function in (quantize, fake_quantize):
        with pytest.raises(PrecisionError, match=message):
            function(x, "fp8_tensor_e4m3")


def test_a_given_scale_is_refused_where_blocks_have_their_own():
    with pytest.raises(PrecisionError, match="fp8_1x128_e4m3 has its own"):
        quantize(torch.zeros(2, 2), "fp8_1x128_e4m3", scale=torch.tensor(1.0))

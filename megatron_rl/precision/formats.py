"""Number formats of low precision: quantize a matrix to codes and scales, and dequantize it.

Codes and scales equal those of Transformer Engine bit for bit (delayed and current scaling, block scaling, MXFP8, NVFP4
with round to nearest). Casts saturate: inf becomes the largest finite value. NaN stays NaN if the element type has one.
To quantize along columns, quantize the rows of the transpose: `quantize(x.T, fmt)`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_rl.errors import PrecisionError
from megatron_rl.precision import fp4, fp8
from megatron_rl.precision.blocks import broadcast_tiles, to_matrix, to_tiles
from megatron_rl.precision.finite import is_finite
from megatron_rl.precision.scales import (
    FP32_MAX,
    DelayedScale,
    amax,
    e8m0_of_amax,
    e8m0_reciprocal,
    e8m0_value,
    scale_of_amax,
)

__all__ = ["FORMATS", "DelayedScale", "Format", "Quantized", "amax", "fake_quantize", "find_format", "quantize"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WHOLE, _STRIP = 1 << 22, 1 << 19  # elements that are quantized at once: of a matrix, and of a strip of a larger one
_NVFP4_RANGE = 448.0 * fp4.MAX


@dataclass(frozen=True)
class Format:
    """A number format: how a matrix is quantized.

    Attributes:
        name: name of the format, its key if it is in `FORMATS`.
        kind: `tensor` (one scale), `channel` (one scale per row), `block` (one scale per tile), `mx` (one E8M0 exponent
            per tile) or `nvfp4` (one E4M3 scale per tile and one fp32 scale per tensor).
        element: dtype of the codes. uint8 means two E2M1 codes per byte.
        max: largest finite value of the element type.
        block: rows and columns of a tile, None for `tensor` and `channel`.
        pow2: True if scales are powers of two.
        outer_per_row: the fp32 scale of `nvfp4` is one per row, not one per tensor. A row's codes then do not depend on
            the other rows.
    """

    name: str
    kind: str
    element: torch.dtype
    max: float
    block: tuple[int, int] | None = None
    pow2: bool = False
    outer_per_row: bool = False

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many rows and columns share a scale in a matrix of this shape."""
        if self.block is not None:
            return self.block
        return (1, columns) if self.kind == "channel" else (rows, columns)


def _formats() -> dict[str, Format]:
    floats = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
    tiles = {"tensor": None, "1x128": (1, 128), "128x128": (128, 128)}
    every = [
        Format("int8_channel", "channel", torch.int8, 127.0),
        Format("nvfp4", "nvfp4", torch.uint8, fp4.MAX, (1, 16)),
        # Square tiles give a matrix and its transpose the same scales.
        Format("nvfp4_16x16", "nvfp4", torch.uint8, fp4.MAX, (16, 16)),
        Format("nvfp4_token", "nvfp4", torch.uint8, fp4.MAX, (1, 16), outer_per_row=True),
    ]
    for suffix, (element, largest) in floats.items():
        every.append(Format(f"mxfp8_{suffix}", "mx", element, largest, (1, 32), pow2=True))
        for name, block in tiles.items():
            kind = "tensor" if block is None else "block"
            every.append(Format(f"fp8_{name}_{suffix}", kind, element, largest, block))
            every.append(Format(f"fp8_{name}_{suffix}_pow2", kind, element, largest, block, pow2=True))
    return {fmt.name: fmt for fmt in every}


FORMATS: Mapping[str, Format] = MappingProxyType(_formats())


def find_format(fmt: Format | str) -> Format:
    """Return the format with this name. Raise PrecisionError with the nearest name if it is unknown."""
    if isinstance(fmt, Format):
        return fmt
    if fmt not in FORMATS:
        near = difflib.get_close_matches(fmt, FORMATS, n=1, cutoff=0.0)[0]
        raise PrecisionError(f"unknown number format {fmt!r}; did you mean {near!r}? Formats: {', '.join(FORMATS)}")
    return FORMATS[fmt]


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: its codes and the scales that dequantize them.

    Attributes:
        codes: [M, N] of the format's element type (NVFP4: uint8 [M, ceil(N/2)], low nibble first).
        scale_inv: the factor that codes are multiplied by. `tensor`: fp32 scalar. `channel`: fp32 [M, 1]. `block`: fp32
            [tiles down, tiles across]. `mx`: E8M0 bytes (uint8) of that shape. `nvfp4`: float8_e4m3fn of that shape.
        format: the number format.
        shape: (M, N).
        global_scale_inv: second factor of `nvfp4`, fp32 scalar, or [M, 1] with `outer_per_row`. None for all other
            formats.
    """

    codes: Tensor
    scale_inv: Tensor
    format: Format
    shape: tuple[int, int]
    global_scale_inv: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values [M, N]: element times scale_inv in fp32, then one rounding to `dtype`."""
        tiles = to_tiles(_decode(self.codes, self.format, self.shape[1]), self.format.tile(*self.shape))
        tiles.mul_(_inverse(self.format, self.scale_inv, self.global_scale_inv))
        return to_matrix(tiles, self.shape).contiguous().to(dtype)


def quantize(x: Tensor, fmt: Format | str, *, scale: Tensor | None = None, eps: float = 0.0) -> Quantized:
    """Quantize a matrix. Tiles that extend past the edge are padded with zeros.

    Args:
        x: [M, N], bf16, fp16 or fp32, any strides.
        fmt: format, or its name.
        scale: fp32 scalar to use instead of a scale from x. Only for `tensor` formats (delayed scaling).
        eps: lower bound of amax for `tensor`, `block` and `channel`.

    Returns:
        Codes and scales.

    Raises:
        PrecisionError: x is not a matrix or has another dtype, the format is unknown or does not take `scale`, or x
            holds NaN or inf and the format is int8.
    """
    fmt = find_format(fmt)
    _check(x, fmt, scale)
    rows = _strip_rows(x, fmt)
    if rows >= x.shape[0]:
        return _quantize(x, fmt, scale, eps)
    codes, inverse = torch.empty(x.shape, dtype=fmt.element), []
    for strip, into in zip(x.split(rows), codes.split(rows), strict=True):
        part = _quantize(strip, fmt, None, eps)
        into.copy_(part.codes)
        inverse.append(part.scale_inv)
    return Quantized(codes, torch.cat(inverse), fmt, (x.shape[0], x.shape[1]))


def _strip_rows(x: Tensor, fmt: Format) -> int:
    """Return how many rows are quantized at once: all of them, unless strips give the same result in half the time.

    On a CPU, the first use of the memory of a large fp32 copy costs more than the arithmetic. Strips use it again.
    """
    if x.is_cuda or x.numel() <= _WHOLE or fmt.kind not in ("block", "mx", "channel"):
        return x.shape[0]
    tile = fmt.block[0] if fmt.block is not None else 1
    return max(1, _STRIP // max(1, tile * x.shape[1])) * tile


def _quantize(x: Tensor, fmt: Format, scale: Tensor | None, eps: float) -> Quantized:
    shape = (x.shape[0], x.shape[1])
    y, scales = _scaled(x.contiguous(), fmt, fmt.tile(*shape), scale, eps)
    y = to_matrix(y, shape)
    if fmt.kind == "nvfp4":
        codes = fp4.pack_nibbles(fp4.encode_e2m1(fp4.round_(y)))
    else:
        codes = (y.round_() if fmt.kind == "channel" else y).to(fmt.element)
    return Quantized(codes.contiguous(), scales.stored, fmt, shape, scales.outer)


def fake_quantize(
    x: Tensor, fmt: Format | str, dtype: torch.dtype | None = None, *, scale: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """Return `quantize(x, fmt).dequantize(dtype or x.dtype)`, bit for bit, in about half the time.

    If x is the transpose of a contiguous matrix, it is quantized without a copy, and the result has the same strides.

    Args:
        x: [M, N], bf16, fp16 or fp32.
        fmt: format, or its name.
        dtype: dtype of the result, None for that of x.
        scale: as in `quantize`.
        eps: as in `quantize`.
    """
    fmt = find_format(fmt)
    _check(x, fmt, scale)
    tile = fmt.tile(*x.shape)
    if not x.is_contiguous() and x.t().is_contiguous() and not fmt.outer_per_row:
        return _fake(x.t(), fmt, (tile[1], tile[0]), dtype, scale, eps).t()
    return _fake(x.contiguous(), fmt, tile, dtype, scale, eps)


def _fake(
    x: Tensor, fmt: Format, tile: tuple[int, int], dtype: torch.dtype | None, scale: Tensor | None, eps: float
) -> Tensor:
    y, scales = _scaled(x, fmt, tile, scale, eps)
    if fmt.kind == "nvfp4":
        fp4.round_(y)
    elif fmt.kind == "channel":
        y.round_().add_(0.0)  # int8 has no -0
    else:
        fp8.decode_fp8(y.to(fmt.element), out=y)
    inverse = _inverse(fmt, scales.stored, scales.outer)
    return to_matrix(y.mul_(inverse), (x.shape[0], x.shape[1])).to(dtype or x.dtype)


def _check(x: Tensor, fmt: Format, scale: Tensor | None) -> None:
    if x.dim() != 2:
        raise PrecisionError(
            f"{fmt.name} quantizes a matrix [M, N]; got shape {list(x.shape)}. Flatten the leading dimensions"
        )
    if x.dtype not in _DTYPES:
        raise PrecisionError(
            f"{fmt.name} quantizes bfloat16, float16 or float32; got {x.dtype}. Convert the tensor first"
        )
    if scale is not None and fmt.kind != "tensor":
        raise PrecisionError(
            f"a given scale is for formats with one scale a tensor (fp8_tensor_*); {fmt.name} has its own"
        )


@dataclass(frozen=True)
class _Scales:
    """Scales of a matrix while it is quantized.

    Attributes:
        factor: fp32, one per tile. x is multiplied by it.
        stored: `scale_inv` of Quantized.
        outer: `global_scale_inv` of Quantized.
    """

    factor: Tensor
    stored: Tensor
    outer: Tensor | None = None


def _scaled(x: Tensor, fmt: Format, tile: tuple[int, int], given: Tensor | None, eps: float) -> tuple[Tensor, _Scales]:
    """Return x (contiguous) times its scales, clamped to the format's range, as new fp32 tiles; and the scales."""
    tiles = to_tiles(x.float(), tile)
    scales = _scales(tiles, fmt, x.dtype, given, eps)
    factor = broadcast_tiles(scales.factor)
    owned = tiles.data_ptr() != x.data_ptr()
    y = tiles.mul_(factor) if owned else tiles * factor
    return y.clamp_(-fmt.max, fmt.max), scales


def _scales(tiles: Tensor, fmt: Format, dtype: torch.dtype, given: Tensor | None, eps: float) -> _Scales:
    """Return the scales of fp32 tiles. `dtype` is the original dtype of the matrix."""
    if given is not None:
        given = given.float().reshape(1, 1)
        return _Scales(given, (1.0 / given).reshape(()))
    peak = amax(tiles, (1, 3))
    if fmt.kind == "nvfp4":
        return _nvfp4_scales(peak, per_row=fmt.outer_per_row)
    if fmt.kind == "mx":
        exponents = e8m0_of_amax(peak, fmt.max)
        return _Scales(e8m0_reciprocal(exponents), exponents)
    if fmt.kind == "channel" and not is_finite(tiles):
        raise PrecisionError(
            f"{fmt.name} has no code for NaN or inf, and the matrix holds some; look for where they arose"
        )
    value_for_inf = torch.finfo(dtype).max if fmt.kind == "block" else FP32_MAX
    scale = scale_of_amax(peak, fmt.max, pow2=fmt.pow2, eps=eps, value_for_inf=value_for_inf)
    inverse = 1.0 / scale
    return _Scales(scale, inverse.reshape(()) if fmt.kind == "tensor" else inverse)


def _nvfp4_scales(peak: Tensor, *, per_row: bool) -> _Scales:
    """Return the two levels of scales of arXiv 2509.25149 from the amax of every tile.

    The fp32 scale maps the amax of the tensor (or of each row) to 448 * 6. The E4M3 scale maps the amax of each tile to
    6.
    """
    outer = scale_of_amax(amax(peak, (1,))[:, None] if per_row else amax(peak), _NVFP4_RANGE)
    sixth = torch.tensor(1.0 / fp4.MAX, dtype=torch.float32, device=peak.device)
    stored = (peak * (outer * sixth)).clamp(max=448.0).to(torch.float8_e4m3fn)
    inverse = 1.0 / outer
    return _Scales((1.0 / (stored.float() * inverse)).clamp(max=FP32_MAX), stored, inverse)


def _inverse(fmt: Format, stored: Tensor, outer: Tensor | None) -> Tensor:
    """Return the factor that dequantizes elements, fp32 [tiles down, 1, tiles across, 1]."""
    if fmt.kind == "mx":
        return broadcast_tiles(e8m0_value(stored))
    if outer is not None:
        return broadcast_tiles(stored.float() * outer)
    return broadcast_tiles(stored.reshape(1, 1) if fmt.kind == "tensor" else stored)


def _decode(codes: Tensor, fmt: Format, columns: int) -> Tensor:
    """Return the fp32 values of the codes, without scales."""
    if fmt.kind == "nvfp4":
        return fp4.decode_e2m1(fp4.unpack_nibbles(codes, columns))
    return codes.float() if fmt.kind == "channel" else fp8.decode_fp8(codes)

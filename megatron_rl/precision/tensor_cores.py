"""Products of FP8 codes by torch's own `torch.nn.functional.scaled_mm`, on tensor cores under CUDA.

They serve to compare the emulation with hardware and to report what a machine can do. Training uses Transformer Engine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.errors import PrecisionError
from megatron_rl.precision.formats import FORMATS, Format, Quantized, quantize

# Kinds of scales of a and b, by torch's names. In order: the forward product of current scaling, one scale per row, the
# weight gradient of block scaling, and the forward product of block scaling.
MODES = {
    "TensorWise": ("TensorWise", "TensorWise"),
    "RowWise": ("RowWise", "RowWise"),
    "BlockWise1x128": ("BlockWise1x128", "BlockWise1x128"),
    "BlockWise128x128": ("BlockWise1x128", "BlockWise128x128"),
}
_FORMATS = {"TensorWise": "fp8_tensor_e4m3", "BlockWise1x128": "fp8_1x128_e4m3", "BlockWise128x128": "fp8_128x128_e4m3"}


def operands(a_MK: Tensor, b_NK: Tensor, mode: str) -> tuple[Quantized, Quantized]:
    """Return both matrices quantized to E4M3 with the scales of a mode.

    Args:
        a_MK: left matrix.
        b_NK: right matrix, transposed. For block scaling K and N must be multiples of 128.
        mode: key of `MODES`.
    """
    kind_a, kind_b = MODES[mode]
    return quantize(a_MK, _format(kind_a, a_MK.shape[1])), quantize(b_NK, _format(kind_b, b_NK.shape[1]))


def scaled_mm(a: Quantized, b: Quantized, mode: str, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiply a by the transpose of b with torch's kernel.

    Args:
        a: codes and scales [M, K].
        b: codes and scales [N, K].
        mode: key of `MODES`.
        out_dtype: dtype of the product.

    Returns:
        The product [M, N].

    Raises:
        PrecisionError: this torch, or this device, has no such kernel.
    """
    if not hasattr(F, "scaled_mm"):
        raise PrecisionError(f"torch {torch.__version__} has no torch.nn.functional.scaled_mm: 2.10 or newer is needed")
    kind_a, kind_b = MODES[mode]
    scale_a, scale_b = _laid_out(a.scale_inv, kind_a), _laid_out(b.scale_inv, kind_b)
    if kind_b == "RowWise":
        scale_b = scale_b.t()
    try:
        return F.scaled_mm(
            a.codes,
            b.codes.t(),
            scale_a,
            getattr(F.ScalingType, kind_a),
            scale_b,
            getattr(F.ScalingType, kind_b),
            output_dtype=out_dtype,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PrecisionError(
            f"torch {torch.__version__} cannot multiply {mode} on {a.codes.device}: {reason}"
        ) from error


def missing_feature(mode: str, device: torch.device) -> str | None:
    """Return why a mode does not work on a device, None if it works. A small product is computed and checked."""
    generator = torch.Generator().manual_seed(0)
    a_MK, b_NK = (torch.randn(rows, 256, generator=generator).to(device) for rows in (128, 256))
    a, b = operands(a_MK, b_NK, mode)
    try:
        product = scaled_mm(a, b, mode)
    except PrecisionError as error:
        return str(error)
    expected = a.dequantize() @ b.dequantize().t()
    worst = float((product.float() - expected).abs().max() / expected.abs().max())
    return None if worst < 0.01 else f"the result is off by {worst:.1%}"


def _format(kind: str, columns: int) -> Format:
    if kind == "RowWise":
        return Format(f"fp8_1x{columns}_e4m3", "block", torch.float8_e4m3fn, 448.0, (1, columns))
    return FORMATS[_FORMATS[kind]]


def _laid_out(scale_inv: Tensor, kind: str) -> Tensor:
    """Return the scales with the strides that cuBLAS needs.

    Scales of 1 x 128 blocks are [M, K/128], contiguous along M. Scales of 128 x 128 blocks are [K/128 padded to a
    multiple of 4, N/128], contiguous along the first dimension.
    """
    if kind == "BlockWise1x128":
        return scale_inv.t().contiguous().t()
    if kind == "BlockWise128x128":
        return F.pad(scale_inv, (0, -scale_inv.shape[1] % 4)).contiguous().t()
    return scale_inv

"""Products of FP8 codes as torch itself offers them (`torch.nn.functional.scaled_mm`): tensor cores on CUDA.

They check the emulation against hardware and say what a machine can do; training goes through Transformer Engine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.errors import PrecisionError
from megatron_rl.precision.formats import FORMATS, Format, Quantized, quantize

# What scales a and b have, by torch's names: in turn of the forward product of current scaling, of scales a row, of the
# weight gradient and of the forward product of block scaling.
MODES = {
    "TensorWise": ("TensorWise", "TensorWise"),
    "RowWise": ("RowWise", "RowWise"),
    "BlockWise1x128": ("BlockWise1x128", "BlockWise1x128"),
    "BlockWise128x128": ("BlockWise1x128", "BlockWise128x128"),
}
_FORMATS = {"TensorWise": "fp8_tensor_e4m3", "BlockWise1x128": "fp8_1x128_e4m3", "BlockWise128x128": "fp8_128x128_e4m3"}


def operands(a_MK: Tensor, b_NK: Tensor, mode: str) -> tuple[Quantized, Quantized]:
    """Both matrices quantized to E4M3 with the scales of a mode. K and N must be multiples of 128 for block scaling."""
    kind_a, kind_b = MODES[mode]
    return quantize(a_MK, _format(kind_a, a_MK.shape[1])), quantize(b_NK, _format(kind_b, b_NK.shape[1]))


def scaled_mm(a: Quantized, b: Quantized, mode: str, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[M, N]: a [M, K] times the transpose of b [N, K], by torch's kernel. Raises PrecisionError where there is none."""
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


def missing(mode: str, device: torch.device) -> str | None:
    """Why a mode does not work on a device, None if it does: tried on a small product, whose result is looked at."""
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
    """The strides that cuBLAS wants: scales of 1 x 128 blocks [M, K/128] with rows next to each other, those of
    128 x 128 blocks as [K/128 padded to a multiple of 4, N/128] with the former next to each other."""
    if kind == "BlockWise1x128":
        return scale_inv.t().contiguous().t()
    if kind == "BlockWise128x128":
        return F.pad(scale_inv, (0, -scale_inv.shape[1] % 4)).contiguous().t()
    return scale_inv

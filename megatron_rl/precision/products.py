"""The three matrix products of a linear layer, on operands quantized by the rules of Transformer Engine's recipes.

A product multiplies dequantized operands in fp32 and is rounded once to the activations' dtype. The result is that of a
tensor core with fp32 accumulation, up to the order of summation. Hopper's fast-accumulation mode keeps fewer bits.
Transformer Engine uses it in the forward product of per-tensor recipes. It is not emulated here.

nvfp4 is the recipe of arXiv 2509.25149 without the random Hadamard transform and without stochastic rounding. In
Transformer Engine this is NVTE_NVFP4_DISABLE_RHT=1 and NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING=1.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.precision.formats import Format, Quantized, find_format, quantize
from megatron_rl.precision.plan import PrecisionPlan

PRODUCTS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class Operands:
    """Formats of the operands of a quantized linear.

    Attributes:
        inputs: format of the inputs.
        weights: format of the weight.
        gradients: format of the output gradients.
        delayed: True if per-tensor scales come from the magnitudes of previous passes, not from the tensor itself.
    """

    inputs: Format
    weights: Format
    gradients: Format
    delayed: bool = False


@dataclass(frozen=True)
class Scales:
    """Scales for per-tensor formats (delayed scaling), fp32 scalars. None: the scale is computed from the tensor."""

    inputs: Tensor | None = None
    weights: Tensor | None = None


class ProductCallbacks(Protocol):
    """Callbacks of the products of a linear: they count products and supply the scale of the gradient."""

    def count(self, product: str) -> None:
        """Count one product (a name of `PRODUCTS`) that ran on quantized operands."""
        ...

    def gradient_scale(self, grad_TN: Tensor) -> Tensor | None:
        """Return the scale of this gradient, None to compute it from the tensor itself."""
        ...


def operands_of(plan: PrecisionPlan) -> Operands | None:
    """Return the operands of a plan's quantized products, None if training is not quantized."""
    if plan.recipe == "none":
        return None
    delayed = plan.recipe == "delayed"
    return Operands(find_format(plan.inputs), find_format(plan.weights), find_format(plan.gradients), delayed)


def transpose_invariant(fmt: Format) -> bool:
    """Return True if a matrix and its transpose have the same codes: one scale per tensor, or square blocks."""
    return fmt.kind == "tensor" if fmt.block is None else fmt.block[0] == fmt.block[1]


def forward_product(
    x: Quantized, weight_NK: Tensor, bias_N: Tensor | None, operands: Operands, scales: Scales
) -> Tensor:
    """Return x W^T + bias, fp32 [T, N].

    Args:
        x: quantized input [T, K].
        weight_NK: weight, quantized here.
        bias_N: bias, or None.
        operands: formats of the operands.
        scales: scales of delayed scaling.
    """
    out_TN = x.dequantize() @ quantize(weight_NK, operands.weights, scale=scales.weights).dequantize().t()
    return out_TN if bias_N is None else out_TN.add_(bias_N)


class QuantizedProducts(torch.autograd.Function):
    """x W^T + bias [T, N] in x's dtype, and its gradients, all on quantized operands.

    The gradients are dgrad = dY W and wgrad = dY^T x. Blocks lie along the dimension that is summed over, so dgrad and
    wgrad use other quantized copies than fprop. Every copy is quantized from the high-precision tensor, never from
    codes. The gradient of the bias is that of the unquantized dY. Backward keeps the codes of x quantized by columns
    (one byte per element) and the weight itself, which is quantized again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        operands: Operands,
        scales: Scales,
        watcher: ProductCallbacks,
    ) -> Tensor:
        rows = quantize(x_TK, operands.inputs, scale=scales.inputs)
        out_TN = forward_product(rows, weight_NK, bias_N, operands, scales).to(x_TK.dtype)
        watcher.count("fprop")
        ctx.operands, ctx.scales, ctx.watcher = operands, scales, watcher
        tensors: list[Tensor | None] = [weight_NK]
        if ctx.needs_input_grad[1]:
            columns = rows if transpose_invariant(operands.inputs) else quantize(x_TK.t(), operands.inputs)
            ctx.shape = columns.shape
            tensors += [columns.codes, columns.scale_inv, columns.global_scale_inv]
        ctx.save_for_backward(*tensors)
        return out_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TN,) = grads
        operands: Operands = ctx.operands
        weight_NK, *kept = ctx.saved_tensors
        scale = ctx.watcher.gradient_scale(grad_TN)
        grad = quantize(grad_TN, operands.gradients, scale=scale).dequantize()
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            weight = _by_columns(weight_NK, operands.weights, ctx.scales.weights)
            x_grad = (grad @ weight).to(grad_TN.dtype)
            ctx.watcher.count("dgrad")
        if ctx.needs_input_grad[1]:
            x = Quantized(kept[0], kept[1], operands.inputs, ctx.shape, kept[2]).dequantize()
            x_TK = x if transpose_invariant(operands.inputs) else x.t()
            if not transpose_invariant(operands.gradients):
                grad = _by_columns(grad_TN, operands.gradients)
            weight_grad = (grad.t() @ x_TK).to(weight_NK.dtype)
            ctx.watcher.count("wgrad")
        if ctx.needs_input_grad[2]:
            bias_grad = grad_TN.sum(0, dtype=torch.float32).to(grad_TN.dtype)
        return x_grad, weight_grad, bias_grad, None, None, None


def _by_columns(x_MN: Tensor, fmt: Format, scale: Tensor | None = None) -> Tensor:
    """Return x quantized in blocks along M and dequantized, fp32 [M, N]."""
    if transpose_invariant(fmt):
        return quantize(x_MN, fmt, scale=scale).dequantize()
    return quantize(x_MN.t(), fmt).dequantize().t()

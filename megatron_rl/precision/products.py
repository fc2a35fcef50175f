"""The three matrix products of a linear layer, on quantized operands, as Transformer Engine's recipes quantize them.

A product runs over dequantized operands in fp32 and is rounded once to the activations' dtype: what a tensor core with
fp32 accumulation gives, up to the order of summation. (Hopper keeps fewer bits in its fast-accumulation mode, which
Transformer Engine uses in the forward product of per-tensor recipes; that is not imitated.)

nvfp4 is the recipe of arXiv 2509.25149 without the random Hadamard transform and without stochastic rounding: as
Transformer Engine runs it with NVTE_NVFP4_DISABLE_RHT=1 and NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING=1.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.precision.formats import Format, Quantized, find_format, quantize
from megatron_rl.precision.plan import PrecisionPlan

PRODUCTS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class Operands:
    """Formats of what a quantized linear multiplies: its inputs, its weight and the gradients of its outputs.

    delayed: one-per-tensor scales come from the magnitudes of earlier passes instead of from the tensor itself.
    """

    inputs: Format
    weights: Format
    gradients: Format
    delayed: bool = False


@dataclass(frozen=True)
class Scales:
    """fp32 scalars given to per-tensor formats (delayed scaling); None: from the tensor."""

    inputs: Tensor | None = None
    weights: Tensor | None = None


class Watcher(Protocol):
    """What the products of a linear ask and tell while they run."""

    def count(self, product: str) -> None:
        """One of `PRODUCTS` ran on quantized operands."""
        ...

    def gradient_scale(self, grad_TN: Tensor) -> Tensor | None:
        """The scale of this gradient, None: from the tensor itself."""
        ...


def operands_of(plan: PrecisionPlan) -> Operands | None:
    """The operands of a plan's quantized products, None where nothing is quantized in training."""
    if plan.recipe == "none":
        return None
    weights = find_format(plan.weights)
    if weights.kind == "nvfp4":  # weights share scales in both directions, so that both products see the same weight
        weights = replace(weights, name="nvfp4_16x16", block=(16, 16))
    return Operands(find_format(plan.inputs), weights, find_format(plan.gradients), plan.recipe == "delayed")


def symmetric(fmt: Format) -> bool:
    """Whether a matrix and its transpose have the same codes: one scale, or square blocks."""
    return fmt.kind == "tensor" if fmt.block is None else fmt.block[0] == fmt.block[1]


def forward_product(
    x: Quantized, weight_NK: Tensor, bias_N: Tensor | None, operands: Operands, scales: Scales
) -> Tensor:
    """x W^T + bias, fp32 [T, N]."""
    out_TN = x.dequantize() @ quantize(weight_NK, operands.weights, scale=scales.weights).dequantize().t()
    return out_TN if bias_N is None else out_TN.add_(bias_N)


class QuantizedProducts(torch.autograd.Function):
    """x W^T + bias [T, N] in x's dtype, and its gradients: dgrad dY W and wgrad dY^T x, all on quantized operands.

    Blocks lie along the dimension that is summed over, so dgrad and wgrad take other copies than fprop; every copy is
    quantized from the high-precision tensor, never from codes. The gradient of the bias is that of the unquantized dY.
    Kept for backward: x by columns as codes (one byte an element), and the weight itself, which is quantized again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        operands: Operands,
        scales: Scales,
        watcher: Watcher,
    ) -> Tensor:
        rows = quantize(x_TK, operands.inputs, scale=scales.inputs)
        out_TN = forward_product(rows, weight_NK, bias_N, operands, scales).to(x_TK.dtype)
        watcher.count("fprop")
        ctx.operands, ctx.scales, ctx.watcher = operands, scales, watcher
        tensors: list[Tensor | None] = [weight_NK]
        if ctx.needs_input_grad[1]:
            columns = rows if symmetric(operands.inputs) else quantize(x_TK.t(), operands.inputs)
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
            x_TK = x if symmetric(operands.inputs) else x.t()
            if not symmetric(operands.gradients):
                grad = _by_columns(grad_TN, operands.gradients)
            weight_grad = (grad.t() @ x_TK).to(weight_NK.dtype)
            ctx.watcher.count("wgrad")
        if ctx.needs_input_grad[2]:
            bias_grad = grad_TN.sum(0, dtype=torch.float32).to(grad_TN.dtype)
        return x_grad, weight_grad, bias_grad, None, None, None


def _by_columns(x_MN: Tensor, fmt: Format, scale: Tensor | None = None) -> Tensor:
    """fp32 [M, N]: x quantized in blocks along M, and dequantized."""
    if symmetric(fmt):
        return quantize(x_MN, fmt, scale=scale).dequantize()
    return quantize(x_MN.t(), fmt).dequantize().t()

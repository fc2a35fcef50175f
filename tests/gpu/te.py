"""Transformer Engine's quantizers, with codes and scales in the layout of `precision.formats`.

Only this module of the GPU tests imports Transformer Engine. Its functions are called only if the package is installed.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ELEMENTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Codes:
    """uint8 codes [M, N] and scale_inv of x [M, N], and those of its transpose if that is quantized separately."""

    codes: Tensor
    scale_inv: Tensor
    codes_t: Tensor | None = None
    scale_inv_t: Tensor | None = None


def _element(name: str) -> Any:
    return importlib.import_module("transformer_engine.pytorch.constants").TE_DType[ELEMENTS[name]]


def _tensors(module: str) -> Any:
    return importlib.import_module(f"transformer_engine.pytorch.tensor.{module}")


def current(x: Tensor, element: str, *, pow2: bool) -> Codes:
    """Quantize x with one scale per tensor, computed from the tensor."""
    kind = _tensors("float8_tensor").Float8CurrentScalingQuantizer
    made = kind(_element(element), device=torch.device("cuda"), columnwise=False, force_pow_2_scales=pow2)(x)
    return Codes(made._data, made._scale_inv)


def delayed(x: Tensor, element: str, scale: Tensor) -> tuple[Codes, Tensor]:
    """Quantize x with one given scale per tensor. Return also the amax that Transformer Engine records."""
    amax = torch.zeros(1, device="cuda")
    made = _tensors("float8_tensor").Float8Quantizer(
        scale.reshape(1).cuda(), amax, _element(element), columnwise=False
    )(x)
    return Codes(made._data, made._scale_inv), amax


def blockwise(x: Tensor, element: str, *, square: bool, pow2: bool) -> Codes:
    """Quantize x with one scale per 128 x 128 elements (`square`) or per 1 x 128 elements.

    Transformer Engine stores scales in the layout that its products read. Those of 1 x 128 blocks are transposed. Both
    are padded along the last dimension to a multiple of 4.
    """
    kind = _tensors("float8_blockwise_tensor").Float8BlockQuantizer
    quantizer = kind(
        _element(element),
        rowwise=True,
        columnwise=True,
        amax_epsilon=0.0,
        force_pow_2_scales=pow2,
        block_scaling_dim=2 if square else 1,
    )
    made, (rows, columns) = quantizer(x), x.shape
    return Codes(
        made._rowwise_data,
        unpadded(made._rowwise_scale_inv, rows, columns, square),
        made._columnwise_data,
        unpadded(made._columnwise_scale_inv, columns, rows, square),
    )


def unpadded(scales: Tensor, rows: int, columns: int, square: bool) -> Tensor:
    """Return the scales [tiles down, tiles across] of a [rows, columns] matrix without padding."""
    across = -(-columns // 128)
    return scales[: -(-rows // 128), :across] if square else scales[:across, :rows].t()


def mxfp8(x: Tensor, element: str) -> Codes:
    """Quantize x with one exponent per 1 x 32 elements.

    Transformer Engine pads the scales to [multiple of 128, multiple of 4]. The padding is removed here.
    """
    made = _tensors("mxfp8_tensor").MXFP8Quantizer(_element(element), rowwise=True, columnwise=False)(x)
    return Codes(made._rowwise_data, made._rowwise_scale_inv[: x.shape[0], : x.shape[1] // 32])


def linear(columns: int, rows: int, weight_NK: Tensor) -> Any:
    """Return a te.Linear without bias that has this weight."""
    module = importlib.import_module("transformer_engine.pytorch").Linear(
        columns, rows, bias=False, params_dtype=weight_NK.dtype, device="cuda"
    )
    with torch.no_grad():
        module.weight.copy_(weight_NK)
    return module


def block_recipe(*, pow2: bool, hybrid: bool) -> Any:
    """Return Float8BlockScaling with or without power-of-two scales.

    Transformer Engine makes this choice in class attributes that it reads from the environment, so they are replaced on
    the instance.
    """
    recipes = importlib.import_module("transformer_engine.common.recipe")
    form = recipes.Format.HYBRID if hybrid else recipes.Format.E4M3
    made = recipes.Float8BlockScaling(fp8_format=form)
    for name in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        object.__setattr__(made, name, recipes.QParams(power_2_scale=pow2, amax_epsilon=0.0))
    return made


def autocast(recipe: Any) -> Any:
    """Return the context in which modules quantize. Its name changed in Transformer Engine 2.8."""
    te = importlib.import_module("transformer_engine.pytorch")
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=recipe)
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe)

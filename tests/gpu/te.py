"""Transformer Engine's quantizers, their codes and scales brought into the layout of `precision.formats`.

Called where it is installed only; the seam at which it is imported.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ELEMENTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Codes:
    """uint8 codes [M, N] and scale_inv of x [M, N], and of its transpose where that is quantized anew."""

    codes: Tensor
    scale_inv: Tensor
    codes_t: Tensor | None = None
    scale_inv_t: Tensor | None = None


def _element(name: str) -> Any:
    return importlib.import_module("transformer_engine.pytorch.constants").TE_DType[ELEMENTS[name]]


def _tensors(module: str) -> Any:
    return importlib.import_module(f"transformer_engine.pytorch.tensor.{module}")


def current(x: Tensor, element: str, *, pow2: bool) -> Codes:
    """One scale per tensor, from the tensor."""
    kind = _tensors("float8_tensor").Float8CurrentScalingQuantizer
    made = kind(_element(element), device=torch.device("cuda"), columnwise=False, force_pow_2_scales=pow2)(x)
    return Codes(made._data, made._scale_inv)


def delayed(x: Tensor, element: str, scale: Tensor) -> tuple[Codes, Tensor]:
    """One given scale per tensor; also the amax that is noted."""
    amax = torch.zeros(1, device="cuda")
    made = _tensors("float8_tensor").Float8Quantizer(
        scale.reshape(1).cuda(), amax, _element(element), columnwise=False
    )(x)
    return Codes(made._data, made._scale_inv), amax


def blockwise(x: Tensor, element: str, *, square: bool, pow2: bool) -> Codes:
    """One scale per 128 x 128 or per 1 x 128 elements. Transformer Engine stores scales as its products read them: those of
    1 x 128 blocks transposed, both padded along the last dimension to a multiple of 4."""
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
    """[tiles down, tiles across] of a [rows, columns] matrix."""
    across = -(-columns // 128)
    return scales[: -(-rows // 128), :across] if square else scales[:across, :rows].t()


def mxfp8(x: Tensor, element: str) -> Codes:
    """One exponent per 1 x 32 elements; scales padded to [multiple of 128, multiple of 4]."""
    made = _tensors("mxfp8_tensor").MXFP8Quantizer(_element(element), rowwise=True, columnwise=False)(x)
    return Codes(made._rowwise_data, made._rowwise_scale_inv[: x.shape[0], : x.shape[1] // 32])


def linear(columns: int, rows: int, weight_NK: Tensor) -> Any:
    """te.Linear without bias that holds this weight."""
    module = importlib.import_module("transformer_engine.pytorch").Linear(
        columns, rows, bias=False, params_dtype=weight_NK.dtype, device="cuda"
    )
    with torch.no_grad():
        module.weight.copy_(weight_NK)
    return module


def block_recipe(*, pow2: bool, hybrid: bool) -> Any:
    """Float8BlockScaling; whether scales are powers of two is an attribute of the class, read from the environment."""
    recipes = importlib.import_module("transformer_engine.common.recipe")
    form = recipes.Format.HYBRID if hybrid else recipes.Format.E4M3
    made = recipes.Float8BlockScaling(fp8_format=form)
    for name in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        object.__setattr__(made, name, recipes.QParams(power_2_scale=pow2, amax_epsilon=0.0))
    return made


def autocast(recipe: Any) -> Any:
    """The context in which modules quantize; its name changed in 2.8."""
    te = importlib.import_module("transformer_engine.pytorch")
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=recipe)
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe)

"""Quantized weights as they are sent: their names, shapes and dtypes, and the config.json that describes them.

Block FP8 has the layout that SGLang and transformers read: `X.weight` float8_e4m3fn [M, N] with `X.weight_scale_inv`
fp32 [ceil(M/128), ceil(N/128)]. int8 has the layout of compressed-tensors' `int-quantized` with one scale per row:
`X.weight` int8 [M, N] with `X.weight_scale` fp32 [M, 1]. A value is its code times its scale. One quantizer
(precision.formats) makes them here, in the trainer's matrix products and in engines that quantize at load.

mxfp8 and nvfp4 are emulated, and have a layout of this package's own. mxfp8: `X.weight` float8_e4m3fn [M, N] with
`X.weight_scale_inv` uint8 [M, ceil(N/32)], the E8M0 exponents. nvfp4: `X.weight` uint8 [M, N], one E2M1 code per byte,
so that every tensor has the shape of its weight; `X.weight_scale` float8_e4m3fn [ceil(M/16), ceil(N/16)];
`X.weight_scale_2` fp32, a scalar.

Here tiles cover the Hugging Face matrices, as engines need them. megatron-core multiplies with fused and sharded
matrices. With 128 x 128 tiles both have the same values if the fused parts begin at tile boundaries, that is if
head_dim and a rank's part of the feed-forward width are multiples of 128. Otherwise the tiles that span two parts
differ.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import CheckpointError
from megatron_rl.precision.finite import is_finite
from megatron_rl.precision.formats import Format, Quantized, find_format, quantize
from megatron_rl.precision.fp4 import pack_nibbles, unpack_nibbles
from megatron_rl.precision.plan import DTYPES, PrecisionPlan
from megatron_rl.weights.hf_model import HFModel

_SCALE = {
    "fp8_128x128_e4m3": "_scale_inv",
    "fp8_128x128_e4m3_pow2": "_scale_inv",
    "int8_channel": "_scale",
    "mxfp8_e4m3": "_scale_inv",
    "nvfp4_16x16": "_scale",
}
_OUTER = "_scale_2"  # the scale of a whole tensor of nvfp4
_SUFFIXES = (*sorted(set(_SCALE.values())), _OUTER)
_SCALE_DTYPE = {"mx": torch.uint8, "nvfp4": torch.float8_e4m3fn}  # float32 for all other kinds
# Engines fuse projections under these names; exceptions are listed by the names of the parts.
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

Stream = Iterable[tuple[str, Tensor | None]]


def export_dtypes(plan: PrecisionPlan, source: HFModel) -> dict[str, torch.dtype]:
    """Return the dtype in which `export_weights` gathers each tensor of a model for the engines.

    A tensor that will be quantized is gathered in the trainer's own dtype, and every other one in the engine's. A
    buffer keeps its stored dtype: 16 bits would change which experts a router chooses.
    """

    def of(name: str) -> torch.dtype:
        if name in source.buffers:
            return source.tensors[name].dtype
        return DTYPES[plan.train if _coded(plan, name) else plan.engine]

    return {name: of(name) for name in source.tensors}


class WireTensors(Iterator[tuple[str, Tensor | None]]):
    """The stream of `export_weights` as it is sent to the engines: codes and scales replace `plan.quantized` tensors.

    Tensors are quantized one by one, on their own device. None (on other ranks) is passed on. If the plan states that
    engines take no codes, the dequantized values are sent under their plain names, in the engines' dtype.

    Args:
        stream: (name, tensor or None) pairs, from `export_weights`.
        plan: what is quantized, and how.
        dequantized: yield the values of the codes, as fp32 tensors under their plain names.

    Raises:
        CheckpointError: names a tensor that is not finite. The stream can still be run to its end, which a collective
            export needs; the remaining tensors are then not quantized.
    """

    def __init__(self, stream: Stream, plan: PrecisionPlan, *, dequantized: bool = False) -> None:
        self._stream, self._plan, self._dequantized = iter(stream), plan, dequantized
        self._ready: deque[tuple[str, Tensor]] = deque()
        self._failed = False

    def __next__(self) -> tuple[str, Tensor | None]:
        if self._ready:
            return self._ready.popleft()
        name, tensor = next(self._stream)
        if tensor is None or self._failed or not _coded(self._plan, name):
            return name, tensor
        if not is_finite(tensor):  # codes saturate, so they would hide it
            self._failed = True
            raise CheckpointError(
                f"tensor '{name}' holds values that are not finite: the engines keep the weights they have"
            )
        coded = quantize(tensor, self._plan.wire)
        if self._dequantized:
            return name, coded.dequantize().contiguous()
        if self._plan.dequantized:
            return name, coded.dequantize(DTYPES[self._plan.engine]).contiguous()
        self._ready.append((scale_name(name, coded.format), coded.scale_inv))
        if coded.global_scale_inv is None:
            return name, coded.codes
        self._ready.append((name + _OUTER, coded.global_scale_inv))
        return name, unpack_nibbles(coded.codes, coded.shape[1]).contiguous()


def scale_name(name: str, fmt: Format | str) -> str:
    """Return the name of the scales of a quantized tensor."""
    return name + _SCALE[find_format(fmt).name]


def is_scale(name: str) -> bool:
    """Return whether a tensor name is that of a quantization scale."""
    return name.endswith(tuple(f".weight{suffix}" for suffix in _SUFFIXES))


def quantization_config(plan: PrecisionPlan, names: Iterable[str]) -> dict[str, Any] | None:
    """Return `quantization_config` of config.json for a folder with these (unquantized) names, or None.

    It is None if nothing is quantized. Block FP8 has the keys that SGLang's Fp8Config reads. mxfp8 and nvfp4 have a
    method that only the embedded engine knows. int8 is compressed-tensors
    with quantized weights only. SGLang itself serves int8 weights with int8 activations only, and refuses this one.
    """
    if not plan.rolls_out_low or plan.dequantized:
        return None
    modules = [name.removesuffix(".weight") for name in names if plan.spared(name)]
    kept = list(dict.fromkeys(["lm_head", *modules]))
    fmt = find_format(plan.wire)
    if fmt.element == torch.int8:
        weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        stated = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
        return stated | {"config_groups": {"group_0": group}, "ignore": kept}
    assert fmt.block is not None
    if fmt.kind != "block":
        stated = {"quant_method": plan.wire, "fmt": "e2m1" if fmt.kind == "nvfp4" else "e4m3"}
        return stated | {"weight_block_size": list(fmt.block), "modules_to_not_convert": kept}
    blocks = {"weight_block_size": list(fmt.block)} | ({"scale_fmt": "ue8m0"} if fmt.pow2 else {})
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    return stated | blocks | {"modules_to_not_convert": kept, "packed_modules_mapping": _FUSED}


def check_config(stated: Mapping[str, Any], plan: PrecisionPlan, where: str) -> None:
    """Check that a folder's `quantization_config` states the plan's format.

    Args:
        stated: the folder's `quantization_config`.
        plan: the plan of the engine.
        where: name of the file for the error message.

    Raises:
        CheckpointError: if a key differs from what the plan's format needs.
    """
    wanted = quantization_config(plan, ()) or {}
    for key in ("quant_method", "format", "fmt", "weight_block_size", "scale_fmt", "config_groups"):
        if stated.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{where}: quantization_config has {key} = {stated.get(key)!r}, "
                f"but {plan.wire} goes with {wanted.get(key)!r}: "
                "export the weights for this engine, or start the engine for these weights"
            )


def dequantize_tensors(
    tensors: Mapping[str, Tensor], plan: PrecisionPlan, where: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the values of a folder with codes and scales, under plain names.

    Args:
        tensors: name -> tensor as stored: codes, scales and unquantized tensors.
        plan: which tensors are quantized, and how.
        where: name of the folder for the error message.
        dtype: dtype of the quantized tensors' values. Other tensors stay as stored.

    Raises:
        CheckpointError: names the tensor, if codes or scales are missing, unexpected, or of the wrong dtype or shape,
            if codes are NaN, or if scales are not finite or not above 0.
    """
    fmt = find_format(plan.wire)
    coded = {name for name in tensors if not is_scale(name) and plan.quantized(name)}
    wanted = {scale_name(name, fmt): name for name in coded}
    wanted |= {name + _OUTER: name for name in coded} if fmt.kind == "nvfp4" else {}
    for name in tensors:
        if is_scale(name) and name not in wanted:
            raise CheckpointError(f"{where}: tensor {name} is unexpected: {plan.wire} has no scales for this tensor")
    values = {}
    for name, tensor in tensors.items():
        if name in coded:
            values[name] = _checked(name, tensor, tensors, fmt, where).dequantize(dtype)
        elif name not in wanted:
            values[name] = tensor
    return values


def quantize_at_load(tensors: Mapping[str, Tensor], plan: PrecisionPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the values that an engine serves from an unquantized folder.

    Each quantized tensor is rounded to the trainer's dtype, quantized and dequantized. The result equals that of
    `dequantize_tensors` for the same weights, exported by a trainer that loaded this folder.

    Args:
        tensors: name -> tensor of the folder.
        plan: which tensors are quantized, and how.
        dtype: dtype of the dequantized values.
    """
    return {
        name: quantize(tensor.to(DTYPES[plan.train]), plan.wire).dequantize(dtype) if plan.quantized(name) else tensor
        for name, tensor in tensors.items()
    }


def model_shapes(tensors: Mapping[str, Tensor], coded: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's own tensors.

    If `coded`, scales are left out: they are not tensors of the model.
    """
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not (coded and is_scale(name))}


def _coded(plan: PrecisionPlan, name: str) -> bool:
    return plan.rolls_out_low and plan.quantized(name)


def _checked(name: str, codes: Tensor, tensors: Mapping[str, Tensor], fmt: Format, where: str) -> Quantized:
    """Return the codes and scales of one tensor. Raise CheckpointError if they are not valid."""

    def refuse(which: str, what: str) -> CheckpointError:
        return CheckpointError(f"{where}: tensor {which} {what}")

    scales_name = scale_name(name, fmt)
    scale = tensors.get(scales_name)
    if scale is None:
        raise refuse(scales_name, f"is missing: {fmt.name} needs it beside {name}")
    if codes.dtype != fmt.element:
        raise refuse(name, f"is {codes.dtype}, but {fmt.name} has codes of {fmt.element}")
    dtype = _SCALE_DTYPE.get(fmt.kind, torch.float32)
    if scale.dtype != dtype:
        raise refuse(scales_name, f"is {scale.dtype}, but scales of {fmt.name} are {dtype}")
    if codes.dim() != 2:
        raise refuse(name, f"has shape {list(codes.shape)}, but {fmt.name} is for matrices")
    rows, columns = codes.shape
    high, wide = fmt.tile(rows, columns)
    expected = (-(-rows // high), -(-columns // wide))
    if tuple(scale.shape) != expected:
        raise refuse(
            scales_name, f"has shape {list(scale.shape)}, but {name} {list(codes.shape)} needs {list(expected)}"
        )
    if not is_finite(codes):
        raise refuse(name, "has codes that are NaN")
    if fmt.kind == "mx":
        if bool((scale == 0xFF).any()):
            raise refuse(scales_name, "has scales that are NaN")
        return Quantized(codes, scale, fmt, (rows, columns))
    if fmt.kind == "nvfp4":
        return _checked_nvfp4(name, codes, scale, tensors.get(name + _OUTER), fmt, refuse)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise refuse(scales_name, "has scales that are not finite or not above 0")
    if fmt.pow2 and not bool((torch.frexp(scale).mantissa == 0.5).all()):
        raise refuse(scales_name, f"has scales that are no powers of two, but {fmt.name} has no others")
    return Quantized(codes, scale, fmt, (rows, columns))


def _checked_nvfp4(
    name: str,
    codes: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    fmt: Format,
    refuse: Callable[[str, str], CheckpointError],
) -> Quantized:
    """Return codes (one per byte) and scales as the quantizer has them. Raise what `refuse` returns if one is invalid.

    Args:
        name: name of the weight.
        codes: uint8 [M, N].
        scale: float8_e4m3fn, one per tile; 0 for a tile of zeros.
        outer: fp32 scalar.
        fmt: the number format.
        refuse: makes the error from the name of a tensor and what is wrong with it.
    """
    if bool((codes > 0xF).any()):
        raise refuse(name, "has codes above 15")
    if not is_finite(scale) or bool((scale.float() < 0).any()):
        raise refuse(name + _SCALE[fmt.name], "has scales that are not finite or below 0")
    if outer is None:
        raise refuse(name + _OUTER, f"is missing: {fmt.name} needs it beside {name}")
    if outer.dtype != torch.float32 or outer.dim():
        raise refuse(name + _OUTER, f"is {outer.dtype} {list(outer.shape)}, but it is one float32 number")
    if not bool(torch.isfinite(outer) & (outer > 0)):
        raise refuse(name + _OUTER, "is not finite or not above 0")
    return Quantized(pack_nibbles(codes), scale, fmt, (codes.shape[0], codes.shape[1]), outer)

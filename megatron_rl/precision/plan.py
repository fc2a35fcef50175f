"""Precision plan: the number format of every class of tensors in the trainer, on the wire and in the engines."""

import re
from dataclasses import dataclass

import torch

from megatron_rl.config import PrecisionConfig
from megatron_rl.errors import ConfigError, PrecisionError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Formats of quantized weights on the wire, by `precision.rollout`. Engines with quantized weights compute in bf16.
WIRE = {
    "fp8_blockwise": "fp8_128x128_e4m3",
    "fp8_blockwise_pow2": "fp8_128x128_e4m3_pow2",
    "int8": "int8_channel",
    "mxfp8": "mxfp8_e4m3",
    "nvfp4": "nvfp4_16x16",
}
# `precision.rollout_activations` that goes with a format of weights, and the format of inputs that it means.
_INPUTS = {
    "fp8_blockwise": ("fp8", "fp8_1x128_e4m3"),
    "fp8_blockwise_pow2": ("fp8", "fp8_1x128_e4m3_pow2"),
    "mxfp8": ("fp8", "mxfp8_e4m3"),
    "nvfp4": ("fp4", "nvfp4_token"),
}

# Only these matrices are quantized, in the trainer and in the engines. Embeddings, lm_head, norms, biases and routers
# never are.
_LINEAR = re.compile(r"\.layers\.(\d+)\..*\.(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\.weight$")


@dataclass(frozen=True)
class PrecisionPlan:
    """The number formats of a run.

    Every format is a name of `precision.formats` (`fp8_128x128_e4m3`), or a dtype (`bf16`) if nothing is quantized.

    Attributes:
        train: dtype of the trainer's parameters and activations.
        recipe: how the trainer's products are quantized (`precision.recipe`).
        inputs: inputs in the trainer's quantized products.
        weights: weights in the trainer's quantized products.
        gradients: output gradients in the trainer's quantized products.
        wire: format in which `quantized` tensors are sent. Other tensors are sent as `engine`.
        engine: dtype in which the engines compute.
        engine_weights: `quantized` tensors when an engine multiplies.
        engine_inputs: inputs of `quantized` tensors when an engine multiplies.
        kv_cache: KV cache of the engines.
        kept: layers (global, from 0) that are quantized neither in the trainer nor in the engines.
        dequantized: True if engines take no codes. The trainer then sends the dequantized values of codes and scales,
            and engines compute with these in `engine`.
    """

    train: str
    recipe: str
    inputs: str
    weights: str
    gradients: str
    wire: str
    engine: str
    engine_weights: str
    engine_inputs: str
    kv_cache: str
    kept: frozenset[int]
    dequantized: bool = False

    @property
    def trains_low(self) -> bool:
        """True if the trainer quantizes the products of its layers."""
        return self.recipe != "none"

    @property
    def rolls_out_low(self) -> bool:
        """True if the engines' weights are quantized."""
        return self.engine_weights != self.engine

    @property
    def quantizes_inputs(self) -> bool:
        """True if engines quantize the inputs of layers with quantized weights."""
        return self.rolls_out_low and self.engine_inputs != self.engine

    def quantized(self, name: str) -> bool:
        """Return True if the Hugging Face tensor `name` is quantized under low precision."""
        found = _LINEAR.search(name)
        return found is not None and int(found[1]) not in self.kept

    def spared(self, name: str) -> bool:
        """Return True if the tensor `name` is not quantized only because its layer is in `kept`."""
        return _LINEAR.search(name) is not None and not self.quantized(name)


def resolve(precision: PrecisionConfig, num_layers: int, *, engine: str, device: str) -> PrecisionPlan:
    """Return the plan of a `precision` section.

    Args:
        precision: the `precision` section of the configuration.
        num_layers: layers of the model.
        engine: `embedded` or `sglang`.
        device: device of the engine, `cuda` or `cpu`.

    Raises:
        ConfigError: keys contradict each other or would have no effect.
        PrecisionError: no layer is left to quantize, or the engine cannot serve the plan.
    """
    refuse_contradictions(precision)
    if engine == "sglang":
        _refuse_for_sglang(precision, device)
    inputs, weights, gradients = _operands(precision)
    wire = WIRE.get(precision.rollout, precision.rollout)
    computed = compute_dtype(precision)
    plan = PrecisionPlan(
        train=precision.train,
        recipe=precision.recipe,
        inputs=inputs,
        weights=weights,
        gradients=gradients,
        wire=wire,
        engine=computed,
        engine_weights=wire,
        engine_inputs=computed if precision.rollout_activations == "none" else _INPUTS[precision.rollout][1],
        kv_cache=computed,
        kept=frozenset({0, num_layers - 1}) if precision.first_last_bf16 else frozenset(),
        dequantized=engine == "sglang" and device == "cpu" and precision.rollout in WIRE,
    )
    if (plan.trains_low or plan.rolls_out_low) and len(plan.kept) >= num_layers:
        raise PrecisionError(
            f"precision.first_last_bf16 leaves none of the model's {num_layers} layers to quantize: set it to false, "
            "or ask for no low precision"
        )
    return plan


def compute_dtype(precision: PrecisionConfig) -> str:
    """Return the dtype in which the engines compute."""
    return "bf16" if precision.rollout in WIRE else precision.rollout


def refuse_contradictions(precision: PrecisionConfig) -> None:
    """Raise ConfigError for keys that contradict each other or that would silently have no effect."""
    p = precision
    if p.recipe == "delayed" and p.first_last_bf16:
        raise ConfigError(
            "precision.first_last_bf16: true does not go with recipe: delayed, whose scales are kept by one context "
            "round all layers (megatron-core refuses it too): take recipe: tensorwise, or set first_last_bf16 to false"
        )
    if p.pow2_scales and p.recipe != "blockwise":
        raise ConfigError(
            f"precision.pow2_scales: true is about the scales of recipe: blockwise, and recipe is {p.recipe}: set it "
            "to false (for the engines' scales alone, take rollout: fp8_blockwise_pow2)"
        )
    if p.format == "hybrid" and p.recipe in ("none", "nvfp4"):
        raise ConfigError(
            f"precision.format: hybrid makes FP8 gradients e5m2, and recipe: {p.recipe} has none: leave format at e4m3"
        )
    wanted = _INPUTS.get(p.rollout, ("none", ""))[0]
    if p.rollout_activations not in ("none", wanted):
        fitting = [name for name, (inputs, _) in _INPUTS.items() if inputs == p.rollout_activations]
        raise ConfigError(
            f"precision.rollout_activations: {p.rollout_activations} needs such weights to multiply with, and rollout "
            f"is {p.rollout}: take rollout: {' or '.join(fitting)}, or rollout_activations: "
            f"{' or '.join(dict.fromkeys(('none', wanted)))}"
        )


def _refuse_for_sglang(precision: PrecisionConfig, device: str) -> None:
    """Raise PrecisionError for settings that SGLang does not support or would apply differently."""
    if precision.rollout in ("mxfp8", "nvfp4") and device != "cpu":
        raise PrecisionError(
            f"precision.rollout: {precision.rollout} is emulated, and SGLang's own {precision.rollout} kernels need "
            "sm_100 and other scales of inputs than the trainer's quantizer has: take rollout: fp8_blockwise, or "
            "rollout.engine: embedded"
        )
    if precision.rollout == "int8":
        raise PrecisionError(
            "precision.rollout: int8 is weights alone, and SGLang's int8 quantizes inputs too: take rollout: "
            "fp8_blockwise, or rollout.engine: embedded"
        )
    if device == "cpu" and precision.rollout_activations != "none":
        raise PrecisionError(
            f"precision.rollout_activations: {precision.rollout_activations} is not available with SGLang on CPU, "
            "which has no low-precision products: set it to none, or rollout.engine: embedded"
        )
    if device != "cpu" and precision.rollout in WIRE and precision.rollout_activations == "none":
        raise PrecisionError(
            f"precision.rollout: {precision.rollout} with rollout_activations: none is weights alone, and SGLang "
            "always quantizes the inputs of quantized layers: set precision.rollout_activations: fp8, or "
            "rollout.engine: embedded"
        )


def _operands(precision: PrecisionConfig) -> tuple[str, str, str]:
    """Return the formats of inputs, weights and output gradients in the trainer's quantized products."""
    grad = "e5m2" if precision.format == "hybrid" else "e4m3"
    pow2 = "_pow2" if precision.pow2_scales else ""
    match precision.recipe:
        case "none":
            return precision.train, precision.train, precision.train
        case "delayed" | "tensorwise":
            return "fp8_tensor_e4m3", "fp8_tensor_e4m3", f"fp8_tensor_{grad}"
        case "blockwise":
            return f"fp8_1x128_e4m3{pow2}", f"fp8_128x128_e4m3{pow2}", f"fp8_1x128_{grad}{pow2}"
        case "mxfp8":
            return "mxfp8_e4m3", "mxfp8_e4m3", f"mxfp8_{grad}"
        case "nvfp4":
            # Square tiles give the weight and its transpose the same scales: fprop and dgrad use the same weight.
            return "nvfp4", "nvfp4_16x16", "nvfp4"

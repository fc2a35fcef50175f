"""Which number format every class of tensors has, in trainer, on the wire and in the engines."""

import re
from dataclasses import dataclass

from megatron_rl.config import PrecisionConfig

# The matrices that are ever quantised; embeddings, lm_head, norms, biases and routers never are. One rule for all sides.
_LINEAR = re.compile(r"\.layers\.(\d+)\..*\.(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\.weight$")


@dataclass(frozen=True)
class PrecisionPlan:
    """Formats are names of `precision.formats` (`fp8_128x128_e4m3`), or dtypes (`bf16`) where nothing is quantised.

    train: parameters and activations of the trainer. inputs, weights, gradients: operands of its quantised products.
    wire: what `quantised` tensors are sent as; the others go as `engine`. engine_weights, engine_inputs: the same tensors
    and their inputs while the engine multiplies, which computes in `engine`. kv_cache: of the engine.
    kept: layers (global, from 0) quantised on neither side.
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

    def quantised(self, name: str) -> bool:
        """Whether the Hugging Face tensor `name` is one that low precision is for."""
        found = _LINEAR.search(name)
        return found is not None and int(found[1]) not in self.kept


_WIRE = {"fp8_blockwise": "fp8_128x128_e4m3", "fp8_blockwise_pow2": "fp8_128x128_e4m3_pow2", "int8": "int8_channel"}


def resolve(precision: PrecisionConfig, num_layers: int) -> PrecisionPlan:
    """The plan of a `precision` section for a model of `num_layers` layers."""
    inputs, weights, gradients = _operands(precision)
    wire = _WIRE.get(precision.rollout, precision.rollout)
    engine = "bf16" if precision.rollout in _WIRE else precision.rollout
    pow2 = "_pow2" if precision.rollout == "fp8_blockwise_pow2" else ""
    return PrecisionPlan(
        train=precision.train,
        recipe=precision.recipe,
        inputs=inputs,
        weights=weights,
        gradients=gradients,
        wire=wire,
        engine=engine,
        engine_weights=wire,
        engine_inputs=f"fp8_1x128_e4m3{pow2}" if precision.rollout_activations == "fp8" else engine,
        kv_cache=engine,
        kept=frozenset({0, num_layers - 1}) if precision.first_last_bf16 else frozenset(),
    )


def _operands(precision: PrecisionConfig) -> tuple[str, str, str]:
    """Formats of inputs, weights and output gradients in the trainer's quantised products."""
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
            return "nvfp4", "nvfp4", "nvfp4"

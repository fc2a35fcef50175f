"""The embedded engine's low precision: how it is asked for, its emulated products, and the check that an engine has it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_rl.config import PrecisionConfig
from megatron_rl.errors import PrecisionError, UserError
from megatron_rl.precision.formats import fake_quantize
from megatron_rl.precision.plan import DTYPES, WIRE, PrecisionPlan, compute_dtype, refuse_contradictions, resolve

ACTIVATIONS = ("none", "fp8")


@dataclass(frozen=True)
class EngineQuantization:
    """What an engine with quantized weights is started with; the words are those of the `precision` section.

    quantization: as `precision.rollout`. activations: as `precision.rollout_activations`. first_last_bf16: the first and
    the last layer are not quantized. parameters: the trainer's dtype, to which a tensor that comes unquantized is rounded
    before it is quantized, so that the weights an engine starts from have the codes the trainer would send.
    """

    quantization: str
    activations: str = "none"
    first_last_bf16: bool = False
    parameters: str = "bf16"

    def __post_init__(self) -> None:
        if self.quantization not in WIRE:
            raise UserError(f"--quantization '{self.quantization}' is not one of {['none', *WIRE]}")

    @classmethod
    def of(cls, precision: PrecisionConfig) -> Self | None:
        """What the run asks of its engines; None when their weights are not quantized. ConfigError for a contradiction."""
        refuse_contradictions(precision)
        if precision.rollout not in WIRE:
            return None
        return cls(precision.rollout, precision.rollout_activations, precision.first_last_bf16, precision.train)

    @property
    def flags(self) -> list[str]:
        """Arguments of the embedded server's command line."""
        flags = [
            "--quantization",
            self.quantization,
            "--activations",
            self.activations,
            "--parameters",
            self.parameters,
        ]
        return [*flags, "--first-last-bf16"] if self.first_last_bf16 else flags

    def plan(self, num_layers: int, dtype: str) -> PrecisionPlan:
        """The run's plan, computed with in `dtype`."""
        precision = PrecisionConfig(
            train=self.parameters,
            rollout=self.quantization,
            rollout_activations=self.activations,
            first_last_bf16=self.first_last_bf16,
        )
        plan = resolve(precision, num_layers)
        inputs = plan.engine_inputs if self.activations == "fp8" else dtype
        return replace(plan, engine=dtype, engine_inputs=inputs, kv_cache=dtype)


def described(dtype: str, engine_quantization: EngineQuantization | None) -> dict[str, Any]:
    """What /model_info says of an engine's precision."""
    none = dict.fromkeys(("quantization", "activations", "first_last_bf16", "parameters"))
    return {"dtype": dtype, **(none if engine_quantization is None else asdict(engine_quantization))}


def requested(quantization: str, activations: str, first_last_bf16: bool, parameters: str) -> EngineQuantization | None:
    """What a command line asks for; UserError for a word that is none of ours, or inputs without quantized weights."""
    for flag, given, known in (("activations", activations, ACTIVATIONS), ("parameters", parameters, tuple(DTYPES))):
        if given not in known:
            raise UserError(f"--{flag} '{given}' is not one of {list(known)}")
    if quantization != "none":
        return EngineQuantization(quantization, activations, first_last_bf16, parameters)
    if activations != "none":
        raise UserError(
            f"--activations {activations} needs quantized weights: give --quantization fp8_blockwise with it"
        )
    if first_last_bf16:
        raise UserError(
            "--first-last-bf16 spares layers of quantized weights, and there are none: give --quantization with it"
        )
    return None


def check_precision(
    url: str, info: Mapping[str, Any], precision: PrecisionConfig, *, dequantized: bool = False
) -> None:
    """Raise PrecisionError naming the URL when a server's account of itself is of another precision than the run asks for.

    info: what `EnginePool.info` answers, of the embedded server or of SGLang. dequantized: as in the run's plan.
    """
    engine_quantization = EngineQuantization.of(precision)
    dtype = compute_dtype(precision)
    if info.get("engine") == "embedded":
        if dequantized:
            raise PrecisionError(f"{url} is an embedded server, which takes codes itself: set rollout.engine: embedded")
        wanted = described(dtype, engine_quantization)
        flags = ["--dtype", dtype, *(engine_quantization.flags if engine_quantization else [])]
    else:
        on_cpu = info.get("device") == "cpu"
        if engine_quantization and on_cpu != dequantized:
            here, other = ("on CPU, which takes no FP8", "sglang") if on_cpu else ("on a GPU", "embedded")
            raise PrecisionError(
                f"{url} is an SGLang server {here}, and the run would send it {'values' if dequantized else 'codes'}: set "
                f"rollout.engine: {other} and run.device: {'cpu' if on_cpu else 'cuda'}, or name servers of the trainer's kind"
            )
        if (
            engine_quantization
            and not dequantized
            and (engine_quantization.quantization == "int8" or engine_quantization.activations == "none")
        ):
            raise PrecisionError(
                f"{url} is an SGLang server, which always quantizes the inputs of quantized layers: set precision.rollout: "
                "fp8_blockwise and precision.rollout_activations: fp8, or use the embedded engine"
            )
        coded = engine_quantization is not None and not dequantized
        wanted = {"dtype": str(DTYPES[dtype]).removeprefix("torch."), "quantization": "fp8" if coded else None}
        flags = ["--dtype", str(wanted["dtype"]), *(["--quantization", "fp8"] if coded else [])]
    wrong = [f"{key} {info.get(key)} instead of {value}" for key, value in wanted.items() if info.get(key) != value]
    if wrong:
        raise PrecisionError(
            f"{url} serves another precision than the run asks for ({', '.join(wrong)}): start it with {' '.join(flags)}, "
            "or change the precision section"
        )


def quantizes_inputs(plan: PrecisionPlan) -> bool:
    return plan.rolls_out_low and plan.engine_inputs != plan.engine


def use_quantized_products(model: nn.Module, values: Mapping[str, Tensor], plan: PrecisionPlan) -> None:
    """Make the linears of quantized weights quantize their inputs too. values: dequantized weights, fp32, by tensor name.

    Raises PrecisionError for a quantized weight that no linear of the model multiplies with.
    """
    left = {name for name in values if plan.quantized(name)}
    for path, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            name = f"{path}.{child_name}.weight".removeprefix(".")
            if isinstance(child, nn.Linear) and name in left:
                weight = values[name].to(child.weight.device)
                setattr(module, child_name, InputQuantizedLinear(weight, child.bias, plan.engine_inputs))
                left.discard(name)
    if left:
        raise PrecisionError(
            f"activations fp8 cannot be emulated: tensor {min(left)} is not the weight of a linear in {type(model).__name__}; "
            "set precision.rollout_activations: none"
        )


class InputQuantizedLinear(nn.Module):
    """x [..., K] -> [..., M] with x quantized row by row: fp32 sums of dequantized products, one rounding to x's dtype.

    So is an FP8 product on a tensor core, up to the order of its sum. weight: dequantized, fp32 [M, K].
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, inputs: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        rows = fake_quantize(x.reshape(-1, x.shape[-1]), self.inputs, torch.float32)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rows, self.weight, bias).to(x.dtype).view(*x.shape[:-1], -1)

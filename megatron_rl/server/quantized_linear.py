"""Emulated linears of the embedded engine that quantize their inputs."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_rl.errors import PrecisionError
from megatron_rl.precision.formats import fake_quantize
from megatron_rl.precision.plan import PrecisionPlan


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

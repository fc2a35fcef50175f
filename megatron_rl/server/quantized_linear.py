"""Linear layers of the embedded engine that quantize their inputs, by emulation."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_rl.errors import PrecisionError
from megatron_rl.precision.formats import fake_quantize
from megatron_rl.precision.plan import PrecisionPlan


def use_quantized_products(model: nn.Module, values: Mapping[str, Tensor], plan: PrecisionPlan) -> None:
    """Replace the linear layers of quantized weights by layers that also quantize their inputs.

    Args:
        model: the model, changed in place.
        values: tensor name -> dequantized weight, fp32.
        plan: the precision plan.

    Raises:
        PrecisionError: if a quantized weight is not the weight of a linear layer of the model.
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
            f"quantized inputs cannot be emulated: tensor {min(left)} is not the weight of a linear in "
            f"{type(model).__name__}; set precision.rollout_activations: none"
        )


class InputQuantizedLinear(nn.Module):
    """Linear layer x [..., K] -> [..., M] that quantizes x row by row.

    Products of dequantized values are summed in fp32, and the sum is rounded once, to the dtype of x. An FP8 product on
    a tensor core is the same, up to the order of its sum.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, inputs: str) -> None:
        """Make the layer.

        Args:
            weight: dequantized, fp32 [M, K].
            bias: [M] or None.
            inputs: format to which x is quantized.
        """
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of quantized x [..., K] with the weight, [..., M], in the dtype of x."""
        rows = fake_quantize(x.reshape(-1, x.shape[-1]), self.inputs, torch.float32)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rows, self.weight, bias).to(x.dtype).view(*x.shape[:-1], -1)

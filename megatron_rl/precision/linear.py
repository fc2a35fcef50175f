"""megatron-core's sharded linears with quantized products, for the layers of its local spec.

Every rank quantizes what it multiplies: its own part of a weight, and under sequence parallelizm the gathered input.
Where tensor parallelizm cuts a tensor, one-per-tensor scales are therefore those of the parts (tensorwise; delayed
scaling agrees on one), and blocks are those of the whole tensor as long as the cut falls between blocks. The codes kept
for backward are those of the gathered input, so that it is gathered once.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_rl.errors import CheckpointError, PrecisionError
from megatron_rl.precision.delayed import LinearScales
from megatron_rl.precision.formats import quantize
from megatron_rl.precision.products import Operands, QuantizedProducts, Scales, forward_product

# Where a layer has its linears, and how log records name them.
LINEARS = {
    "qkv": ("self_attention", "linear_qkv"),
    "proj": ("self_attention", "linear_proj"),
    "fc1": ("mlp", "linear_fc1"),
    "fc2": ("mlp", "linear_fc2"),
}


class QuantizedLinear(torch.nn.Module):
    """Mixed into a sharded linear. ran: how often each of `PRODUCTS` ran quantized, until somebody clears it.

    scales: of delayed scaling, part of the checkpoint; None with other recipes.
    """

    def __init__(self, *args: Any, operands: Operands, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.operands = operands
        self.ran: Counter[str] = Counter()
        self.scales = LinearScales(operands, self.weight.device) if operands.delayed else None  # type: ignore[arg-type]

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        grad_output_buffer: Any = None,
        wgrad_deferral_limit: Any = None,
    ) -> Tensor:
        """input [t, 1, K], this rank's rows under sequence parallelizm -> [T, 1, N] in its dtype."""
        if gradient_accumulation_fusion or grad_output_buffer is not None:
            raise PrecisionError("quantized linears neither fuse nor defer weight gradients: turn those options off")
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        x_TK = input.flatten(0, -2)
        scales = Scales() if self.scales is None else self.scales.forward(x_TK, weight)
        if torch.is_grad_enabled():
            out_TN = QuantizedProducts.apply(x_TK, weight, bias, self.operands, scales, self)
        else:
            x = quantize(x_TK, self.operands.inputs, scale=scales.inputs)
            out_TN = forward_product(x, weight, bias, self.operands, scales).to(x_TK.dtype)
            self.count("fprop")
        return out_TN.view(*input.shape[:-1], -1)

    def count(self, product: str) -> None:
        self.ran[product] += 1

    def gradient_scale(self, grad_TN: Tensor) -> Tensor | None:
        return None if self.scales is None else self.scales.backward(grad_TN)

    def get_extra_state(self) -> Any:
        return None if self.scales is None else self.scales.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Takes over scales of delayed scaling; a checkpoint of another recipe has none, and they start anew.

        Raises CheckpointError for what Transformer Engine saved in this place.
        """
        if self.scales is None or state is None:
            return
        if not isinstance(state, dict):
            raise CheckpointError(
                "the checkpoint's delayed scales are in Transformer Engine's own format: resume with Transformer Engine, or "
                "with another precision.recipe"
            )
        self.scales.load_state_dict(state)


class QuantizedColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """Y = X W^T, W cut along its outputs."""


class QuantizedRowParallelLinear(QuantizedLinear, RowParallelLinear):
    """Y = X W^T, W cut along its inputs; ranks add up products that are already rounded to the activations' dtype."""


_QUANTIZED = {
    ColumnParallelLinear: QuantizedColumnParallelLinear,
    RowParallelLinear: QuantizedRowParallelLinear,
}


def quantized_layer(layer: ModuleSpec, operands: Operands) -> ModuleSpec:
    """The spec of a local TransformerLayer, its four linears with quantized products."""
    parts = dict(vars(layer.submodules))
    for part, name in LINEARS.values():
        spec = parts[part]
        plain = getattr(spec.submodules, name)
        linear = ModuleSpec(module=_QUANTIZED[plain], params={"operands": operands})
        parts[part] = dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **{name: linear}))
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, **parts))


def linears(block: Any) -> Iterator[tuple[int, str, Any]]:
    """(global layer from 0, `qkv`..., module) of the four linears of each layer of a TransformerBlock."""
    for layer in block.layers:
        for kind, (part, name) in LINEARS.items():
            yield layer.layer_number - 1, kind, getattr(getattr(layer, part), name)

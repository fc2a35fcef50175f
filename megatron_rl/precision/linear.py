"""megatron-core's sharded linears with quantized products, for the layers of its local spec.

Every rank quantizes the tensors that it multiplies: its shard of a weight, and under sequence parallelism the gathered
input. If tensor parallelism cuts a tensor, every shard therefore has its own scale under `tensorwise`. Delayed scaling
shares one scale between ranks. Blocks are those of the whole tensor if the cut lies between blocks. Backward keeps the
codes of the gathered input, so the input is gathered only once.
"""

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
from megatron_rl.precision.spec_parts import parts_of, with_parts

# Log name -> (module of the layer, linear in that module).
LINEARS = {
    "qkv": ("self_attention", "linear_qkv"),
    "proj": ("self_attention", "linear_proj"),
    "fc1": ("mlp", "linear_fc1"),
    "fc2": ("mlp", "linear_fc2"),
}


class QuantizedLinear(torch.nn.Module):
    """Mixin that makes a sharded linear multiply quantized operands.

    Attributes:
        operands: formats of the operands.
        ran: how often each of `PRODUCTS` ran quantized since the counter was last cleared.
        scales: scales of delayed scaling, part of the checkpoint. None with other recipes.
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
        gtp_remat_size: int = 1,
    ) -> Tensor:
        """Return the output [T, 1, N] in the dtype of the input.

        `input` is [t, 1, K]. Under sequence parallelism t counts only the rows of this rank. The other parameters are
        those of megatron-core's linears.
        """
        if gradient_accumulation_fusion or grad_output_buffer is not None or gtp_remat_size > 1:
            raise PrecisionError(
                "quantized linears neither fuse nor defer weight gradients, nor gather weights: turn those options off"
            )
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
        """Load the scales of delayed scaling. A checkpoint of another recipe has none: then keep the initial scales.

        Raises:
            CheckpointError: the state was saved by Transformer Engine.
        """
        if self.scales is None or state is None:
            return
        if not isinstance(state, dict):
            raise CheckpointError(
                "the checkpoint's delayed scales are in Transformer Engine's own format: resume with Transformer "
                "Engine, or with another precision.recipe"
            )
        self.scales.load_state_dict(state)


class QuantizedColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """Y = X W^T, with W cut along its outputs."""


class QuantizedRowParallelLinear(QuantizedLinear, RowParallelLinear):
    """Y = X W^T, with W cut along its inputs.

    Every rank rounds its product to the activations' dtype before ranks are summed.
    """


_QUANTIZED = {
    ColumnParallelLinear: QuantizedColumnParallelLinear,
    RowParallelLinear: QuantizedRowParallelLinear,
}


def quantized_layer(layer: ModuleSpec, operands: Operands) -> ModuleSpec:
    """Return the spec of a local TransformerLayer whose four linears have quantized products."""
    parts = dict(vars(layer.submodules))
    for part, name in LINEARS.values():
        plain = getattr(parts_of(parts[part]), name)
        linear = ModuleSpec(module=_QUANTIZED[plain], params={"operands": operands})
        parts[part] = with_parts(parts[part], **{name: linear})
    return with_parts(layer, **parts)


def linears(block: Any) -> Iterator[tuple[int, str, Any]]:
    """Yield (global layer from 0, key of `LINEARS`, module) of the four linears of each layer of a TransformerBlock."""
    for layer in block.layers:
        for kind, (part, name) in LINEARS.items():
            yield layer.layer_number - 1, kind, getattr(getattr(layer, part), name)

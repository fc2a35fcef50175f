"""The policy's forward pass in other arithmetic, for scoring: without its recipe, or with the products of an engine.

An engine's dtype is not imitated. The effect of rounding to 16 bits on a token depends on the order of every sum.
Rounding the trainer's activations in the same places gives noise of the same size, but it is unrelated to the engine's
noise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rl.policy.actor import Policy
from megatron_rl.precision.formats import fake_quantize
from megatron_rl.precision.linear import QuantizedLinear, linears
from megatron_rl.precision.plan import PrecisionPlan
from megatron_rl.weights.hf_model import HFModel
from megatron_rl.weights.name_table import entries, local_tensors


@contextmanager
def restore_weights_after(policy: Policy) -> Iterator[list[Tensor]]:
    """Restore the policy's parameters at the end, bit by bit, whatever is written into them inside. Yield the copy."""
    kept = policy.copy_weights()
    try:
        yield kept
    finally:
        policy.put_weights(kept)


@contextmanager
def without_recipe(policy: Policy) -> Iterator[None]:
    """Make the linear layers multiply their inputs without quantization."""
    found = [one for model in policy.models for _, _, one in linears(model.decoder) if isinstance(one, QuantizedLinear)]
    try:
        for linear in found:
            plain = ColumnParallelLinear if isinstance(linear, ColumnParallelLinear) else RowParallelLinear
            # An attribute of the instance has precedence over the quantized method of its class.
            vars(linear)["_forward_impl"] = plain._forward_impl.__get__(linear)
        yield
    finally:
        for linear in found:
            vars(linear).pop("_forward_impl", None)


@contextmanager
def engine_products(policy: Policy, weights: HFModel, plan: PrecisionPlan, *, quantized_inputs: bool) -> Iterator[None]:
    """Make linear layers with quantized weights multiply like an engine with quantized inputs.

    The product is computed in float32 and rounded once to the layer's dtype. If tensor parallelism splits the inputs of
    a product inside a block of 128, blocks are those of the parts.

    Args:
        policy: the policy whose layers are changed.
        weights: the weights the engine holds, used unchanged, because the policy's own parameters may have fewer bits.
        plan: the precision of trainer and engines.
        quantized_inputs: quantize inputs row by row, in the format of the plan's engine_inputs.
    """
    fmt = plan.engine_inputs if quantized_inputs else None
    of_parameter = {id(p): e for e, p in local_tensors(policy.models, entries(policy.family, policy.shape)).values()}
    found = [
        (layer, one) for model in policy.models for layer, _, one in linears(model.decoder) if layer not in plan.kept
    ]
    before = [(linear, vars(linear).get("_forward_impl")) for _, linear in found]
    try:
        for _, linear in found:
            entry = of_parameter[id(linear.weight)]
            read = entry.rule.layout.read(weights.readers(entry), policy.mesh.tp_rank, policy.mesh.tp_size)
            vars(linear)["_forward_impl"] = _product(read.to(policy.mesh.device, torch.float32), fmt)
        yield
    finally:
        for linear, impl in before:
            _restore(linear, impl)


def _product(weight_NK: Tensor, fmt: str | None) -> Callable[..., Tensor]:
    def product(
        input: Tensor, weight: Tensor, bias: Tensor | None, *, sequence_parallel: bool, tp_group: Any, **_: Any
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        x_TK = input.flatten(0, -2)
        x_TK = x_TK.float() if fmt is None else fake_quantize(x_TK, fmt, torch.float32)
        out_TN = F.linear(x_TK, weight_NK, None if bias is None else bias.float())
        return out_TN.to(input.dtype).view(*input.shape[:-1], -1)

    return product


def _restore(linear: torch.nn.Module, impl: Any) -> None:
    if impl is None:
        vars(linear).pop("_forward_impl", None)
    else:
        vars(linear)["_forward_impl"] = impl

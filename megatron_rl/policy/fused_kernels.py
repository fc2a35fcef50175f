"""What a GPU computes in other kernels than a CPU: which parts of layers are fused, and which sums overlap.

The choices are functions of the model, the dtype and the device. So a machine without a GPU can test them.
"""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_rl.config import ParallelConfig
from megatron_rl.weights.families import ModelShape


def fused_kernels(shape: ModelShape, *, te: bool, cuda: bool) -> dict[str, Any]:
    """Return the fields of megatron-core's configuration that fuse kernels on a GPU.

    Unfused RoPE synchronizes with the host four times a layer and micro-batch.

    Args:
        shape: shape of the model.
        te: the layers are Transformer Engine's.
        cuda: the model is on a GPU.
    """
    fused = te and cuda
    gated = fused and shape.activation == "silu" and not shape.out_bias
    # megatron-core 0.16.1 does not tell the fused kernel of packed streams that dimensions are interleaved. With
    # latent attention it fuses YaRN alone.
    rope = fused and not shape.rope.interleaved and shape.latent is None
    return {
        "persist_layer_norm": te,
        "bias_activation_fusion": gated,
        "apply_rope_fusion": rope,
        **({"moe_permute_fusion": fused} if shape.experts is not None else {}),
    }


def overlaps_gradients(parallel: ParallelConfig, *, te: bool, cuda: bool) -> bool:
    """Return whether gradients are summed over replicas while backward runs.

    megatron-core sums a bucket when each of its parameters has a gradient. A local expert without tokens has none.
    Parameters are not gathered during forward: exports read them right after the step.

    Args:
        parallel: the layout.
        te: the layers are Transformer Engine's.
        cuda: the model is on a GPU.
    """
    return te and cuda and parallel.data * parallel.context > 1


def fuse_weight_gradients(models: Iterable[torch.nn.Module]) -> int:
    """Let Transformer Engine's linears add weight gradients to the float32 buffers. Return the number of linears.

    The sum stays in the product, so no micro-batch's gradient is rounded to bf16 before it is added. megatron-core's
    own setting would demand apex, because it also applies to the output layer, whose gradient this package computes.
    """
    linears = [part for model in models for part in model.modules() if hasattr(part, "fuse_wgrad_accumulation")]
    for linear in linears:
        linear.fuse_wgrad_accumulation = True  # type: ignore[assignment]
    return len(linears)

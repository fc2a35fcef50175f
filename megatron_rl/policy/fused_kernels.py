"""What a GPU computes in other kernels than a CPU: which layers are used, and which of their parts are fused.

The choices are functions of the model, the dtype and the device. So a machine without a GPU can test them.
"""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_rl.config import ParallelConfig
from megatron_rl.weights.families import ModelShape


def takes_engine_layers(dtype: torch.dtype, *, installed: bool, cuda: bool) -> bool:
    """Return whether the layers are Transformer Engine's, or else megatron-core's local ones.

    In float32 its products on a GPU are TF32, whatever torch's settings are. Of its kernels of attention only the
    unfused one takes float32, and that stores the scores of all heads and sequences: 30 GB a layer at 4096 tokens.
    Without a GPU
    Transformer Engine runs in tests alone, on torch's products.

    Args:
        dtype: dtype of the model's parameters.
        installed: Transformer Engine is installed and loads.
        cuda: the model is on a GPU.
    """
    return installed and not (cuda and dtype == torch.float32)


def fused_kernels(shape: ModelShape, *, engine: bool, cuda: bool) -> dict[str, Any]:
    """Return the fields of megatron-core's configuration that fuse kernels on a GPU.

    Unfused RoPE synchronizes with the host four times a layer and micro-batch.

    Args:
        shape: shape of the model.
        engine: the layers are Transformer Engine's.
        cuda: the model is on a GPU.
    """
    fused = engine and cuda
    gated = fused and shape.activation == "silu" and not shape.out_bias
    # megatron-core 0.16.1 does not tell the fused kernel of packed streams that dimensions are interleaved. With
    # latent attention it fuses YaRN alone.
    rope = fused and not shape.rope.interleaved and shape.latent is None
    return {
        "persist_layer_norm": engine,
        "bias_activation_fusion": gated,
        "apply_rope_fusion": rope,
        **({"moe_permute_fusion": fused} if shape.experts is not None else {}),
    }


def overlaps_gradients(parallel: ParallelConfig, *, engine: bool, cuda: bool) -> bool:
    """Return whether gradients are summed over replicas while backward runs.

    megatron-core sums a bucket when each of its parameters has a gradient. A local expert without tokens has none.
    Parameters are not gathered during forward: exports read them right after the step.

    Args:
        parallel: the layout.
        engine: the layers are Transformer Engine's.
        cuda: the model is on a GPU.
    """
    return engine and cuda and parallel.data * parallel.context > 1


def fuse_weight_gradients(models: Iterable[torch.nn.Module]) -> int:
    """Let Transformer Engine's linears add weight gradients to the float32 buffers. Return the number of linears.

    The sum stays in the product, so no micro-batch's gradient is rounded to bf16 before it is added. megatron-core's
    own setting would demand apex, because it also applies to the output layer, whose gradient this package computes.
    """
    linears = [part for model in models for part in model.modules() if hasattr(part, "fuse_wgrad_accumulation")]
    for linear in linears:
        linear.fuse_wgrad_accumulation = True  # type: ignore[assignment]
    return len(linears)

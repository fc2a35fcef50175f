"""The one place that decides what a loss is divided by.

megatron-core offers several conventions for `loss_func`; the tempting ones (a local mean; token counts without
per-token mode) give gradients 43-48 % off while the reported loss is right. Here the objective divides by the
counts of the WHOLE optimizer update, `calculate_per_token_loss=True` turns off every rescaling (by micro-batches,
context and data parallel), and `finalize_model_grads` is called without a token count: gradients are plain sums.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads

from megatron_rl.objectives import LossNorm
from megatron_rl.types import Batch


def global_norm(norm: LossNorm, batch: Batch, horizon: int) -> LossNorm:
    """The objective's norm with the counts of the whole update: the same on every rank and for every packing.

    horizon: used by seq_mean_token_sum_norm when the objective names none (the longest allowed response).
    """
    trained_B = np.add.reduceat(batch.mask, batch.cu_seqlens[:-1]) if len(batch) else np.zeros(0)
    return replace(
        norm,
        tokens=max(1, int(batch.mask.sum())),
        sequences=max(1, int((trained_B > 0).sum())),
        horizon=norm.horizon or float(horizon),
    )


def sum_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """`finalize_model_grads` without its division by a token count (and without that count's host sync)."""
    finalize_model_grads(model, None, **kwargs)

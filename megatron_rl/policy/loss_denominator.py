"""The loss denominator. Only this module decides what a loss is divided by.

megatron-core offers several conventions for `loss_func`. The obvious ones (a local mean, or token counts without
per-token mode) give gradients that are 43-48 % off, while the reported loss is right. Here the objective divides by
the counts of the WHOLE optimizer update. `calculate_per_token_loss=True` turns off every rescaling (by micro-batches,
context parallel and data parallel). `finalize_model_grads` is called without a token count. So gradients are plain
sums.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads

from megatron_rl.objectives import LossNorm
from megatron_rl.types import Batch


def global_norm(norm: LossNorm, batch: Batch, horizon: int) -> LossNorm:
    """Return the objective's norm with the counts of the whole update: the same on every rank and for every packing.

    Args:
        norm: the objective's norm.
        batch: the batch of the whole update.
        horizon: longest allowed response, in tokens. seq_mean_token_sum_norm uses it if the objective sets no horizon.
    """
    trained_B = np.add.reduceat(batch.mask, batch.cu_seqlens[:-1]) if len(batch) else np.zeros(0)
    return replace(
        norm,
        tokens=max(1, int(batch.mask.sum())),
        sequences=max(1, int((trained_B > 0).sum())),
        horizon=norm.horizon or float(horizon),
    )


def finalize_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Call `finalize_model_grads` without a token count.

    So it does not divide by the count and does not sync the count to the host. The signature is that of
    `finalize_model_grads`; `num_tokens` is ignored.
    """
    finalize_model_grads(model, None, **kwargs)

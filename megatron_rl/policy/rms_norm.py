"""RMSNorm of float32 on a CPU, in few passes over memory.

torch's own is made of a dozen operations there: forward and backward take 2 to 4 times as long.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, with the mean over the last dimension.

    Args:
        x: [..., H].
        weight: [H].
        eps: added to the mean.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With s = 1 / sqrt(mean(x^2) + eps) and g the gradient of y = x s w:

    dw = sum over rows of g x s,   dx = s (g w - x s^2 mean(g w x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        product = grad * x
        rows, scales = product.reshape(-1, x.shape[-1]), scale.reshape(-1)
        of_weight = rows.t().mv(scales)
        pull = rows.mv(weight).mul_(scales.pow(3)).div_(-x.shape[-1]).view(scale.shape)
        of_x = torch.mul(grad, weight, out=product).mul_(scale).addcmul_(x, pull)
        return of_x, of_weight, None

"""h + sigma * eps as one autograd function that stores no noise: backward computes the same eps again."""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from megatron_rl.alp.noise import Key, NoiseRows, normal_chunks
from megatron_rl.errors import ConfigError


class Perturb(torch.autograd.Function):
    """perturb(h, log_sigma) = h + exp(log_sigma) * eps, where eps are the normals of the rows under the key.

    The gradient of h passes through unchanged. The gradient of log_sigma is sum(grad * sigma * eps) over the rows of
    this rank. Backward keeps log_sigma and the rows, nothing of the size of h.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, log_sigma: torch.Tensor, rows: NoiseRows, key: Key) -> torch.Tensor:
        """Return hidden plus noise, added in at least float32 and rounded once.

        Args:
            ctx: context of autograd.
            hidden: [t, ..., H], any float dtype.
            log_sigma: float32 [1].
            rows: the tokens of the rows of hidden.
            key: key of the noise.
        """
        ctx.save_for_backward(log_sigma)
        ctx.rows, ctx.key = rows, key
        return add_noise(hidden, log_sigma.exp(), rows, key)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (log_sigma,) = ctx.saved_tensors
        d_log_sigma = None
        if ctx.needs_input_grad[1]:
            total = dot_noise(grad, ctx.rows, ctx.key)
            d_log_sigma = (total * log_sigma.to(total.dtype).exp()).to(log_sigma.dtype)
        return grad, d_log_sigma, None, None


def add_noise(hidden: torch.Tensor, sigma: torch.Tensor, rows: NoiseRows, key: Key) -> torch.Tensor:
    """Return hidden + sigma * eps as a new tensor of the same shape and dtype.

    Args:
        hidden: [t, ..., H].
        sigma: [1].
        rows: the tokens of the rows of hidden.
        key: key of the noise.
    """
    flat = _rows_of(hidden, rows)
    if hidden.is_cuda:
        added: torch.Tensor = _kernels().launch_add_noise(flat, sigma, rows, key)
        return added.view(hidden.shape)
    out = torch.empty_like(flat)
    _add_on_cpu(flat, sigma, rows, key, 0, out)
    return out.view(hidden.shape)


def add_noise_(x: torch.Tensor, sigma: torch.Tensor, rows: NoiseRows, key: Key, first: int = 0) -> torch.Tensor:
    """Add sigma * eps to x in place and return x.

    Args:
        x: [t, n].
        sigma: [1].
        rows: the tokens of the rows of x.
        key: key of the noise.
        first: global index of column 0 of x. eps is the noise of columns first to first + n.
    """
    _rows_of(x, rows)
    if x.is_cuda:
        _kernels().launch_add_noise(x, sigma, rows, key, first, out=x)
        return x
    _add_on_cpu(x, sigma, rows, key, first, x)
    return x


def dot_noise(grad: torch.Tensor, rows: NoiseRows, key: Key, first: int = 0) -> torch.Tensor:
    """Return the sum of grad * eps, float64 [1].

    Args:
        grad: [t, ..., n].
        rows: the tokens of the rows of grad.
        key: key of the noise.
        first: global index of column 0 of grad. eps is the noise of columns first to first + n.
    """
    flat = _rows_of(grad, rows)
    if grad.is_cuda:
        on_gpu: torch.Tensor = _kernels().launch_dot_noise(flat, rows, key, first)
        return on_gpu
    total = torch.zeros(1, dtype=torch.float64)
    work = torch.promote_types(grad.dtype, torch.float32)
    for at, eps in normal_chunks(rows, key, flat.shape[1], first):
        total += torch.dot(flat[at].to(work).reshape(-1), eps.to(work).reshape(-1))
    return total


def _add_on_cpu(x: torch.Tensor, sigma: torch.Tensor, rows: NoiseRows, key: Key, first: int, out: torch.Tensor) -> None:
    scale = sigma.item()
    for at, eps in normal_chunks(rows, key, x.shape[1], first):
        if x.dtype in (torch.float32, torch.float64):
            torch.add(x[at], eps, alpha=scale, out=out[at])
        else:
            out[at] = eps.mul_(scale).add_(x[at])  # the sum is float32 and is rounded once


@functools.cache
def _kernels() -> ModuleType:
    """Return the module of the GPU kernels. It is imported on first use, because it needs triton."""
    try:
        return importlib.import_module("megatron_rl.alp.kernels")
    except ImportError as error:
        raise ConfigError(
            f"alp.enabled: on a GPU it needs triton, which cannot be imported ({error}): install it"
        ) from error


def _rows_of(hidden: torch.Tensor, rows: NoiseRows) -> torch.Tensor:
    """Return hidden [t, ..., H] as [t, H], one row per token."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    if len(flat) != len(rows):
        raise ValueError(
            f"{len(flat)} rows of hidden state, but {len(rows)} names of tokens: the slice of this rank is wrong"
        )
    return flat

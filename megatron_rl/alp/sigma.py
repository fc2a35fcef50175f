"""The scale of a perturbation inside a model: one float32 number on a logarithmic axis, whatever the model's precision."""

import math
from collections.abc import Callable
from typing import Self

import torch

from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.alp.names import LOG_SIGMA


class HoldsSigma(torch.nn.Module):
    """A module with a log_sigma [1] float32: a parameter where it is learnt, else a buffer; None where there is no noise.

    layer_index: the global layer from 0; the number of layers where logits are perturbed.
    """

    layer_index: int
    log_sigma: torch.Tensor | None

    def hold_sigma(self, noise: LayerNoise, *, perturbs: bool = True) -> None:
        """To be called once, at the end of the constructor."""
        value = torch.full((1,), math.log(noise.sigma_init), dtype=torch.float32) if perturbs else None
        if value is not None and noise.learnable:
            self.log_sigma = torch.nn.Parameter(value)
        else:
            self.register_buffer(LOG_SIGMA, value)

    @property
    def sigma(self) -> float:
        assert self.log_sigma is not None
        return self.log_sigma.detach().exp().item()

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Self:
        """Moves and casts the module; log_sigma moves, but stays float32: bfloat16 has three digits for the logarithm."""
        kept = None if self.log_sigma is None else self.log_sigma.data
        super()._apply(fn, recurse)
        if kept is not None and self.log_sigma is not None:
            self.log_sigma.data = kept.to(self.log_sigma.device)
        return self


def sigma_holders(model: torch.nn.Module) -> list[HoldsSigma]:
    """The modules of a model that have a sigma, in the order of the forward pass."""
    return [m for m in model.modules() if isinstance(m, HoldsSigma) and m.log_sigma is not None]

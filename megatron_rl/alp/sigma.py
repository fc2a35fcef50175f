"""The scale of a perturbation in a model: the logarithm of sigma, always one float32 number."""

import math
from collections.abc import Callable
from typing import Self

import torch

from megatron_rl.alp.layer_noise import LayerNoise
from megatron_rl.alp.names import LOG_SIGMA


class SigmaModule(torch.nn.Module):
    """A module with the logarithm of a noise scale.

    Attributes:
        layer_index: the global layer from 0. The number of layers if logits are perturbed.
        log_sigma: float32 [1], whatever the model's precision. A parameter if it is learned, else a buffer. None if
            there is no noise.
    """

    layer_index: int
    log_sigma: torch.Tensor | None

    def hold_sigma(self, noise: LayerNoise, *, perturbs: bool = True) -> None:
        """Create log_sigma. Call this once, at the end of the constructor."""
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
        """Move and cast the module. log_sigma is moved but stays float32, as bfloat16 keeps only three digits of it."""
        kept = None if self.log_sigma is None else self.log_sigma.data
        super()._apply(fn, recurse)
        if kept is not None and self.log_sigma is not None:
            self.log_sigma.data = kept.to(self.log_sigma.device)
        return self


def sigma_modules(model: torch.nn.Module) -> list[SigmaModule]:
    """Return the modules of a model that have a sigma, in the order of the forward pass."""
    return [m for m in model.modules() if isinstance(m, SigmaModule) and m.log_sigma is not None]

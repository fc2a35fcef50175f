"""Scales of low precision: from the largest magnitude to the factor a tensor is multiplied by before its cast.

The rules are those of Transformer Engine's kernels (recipe_common.cuh), bit for bit; all arithmetic is fp32.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import PrecisionError

FP32_MAX = torch.finfo(torch.float32).max
_SIGN_AND_EXPONENT = -0x800000  # 0xFF800000 as int32: clears the mantissa, so floors to a power of two
_MANTISSA = 0x7FFFFF


def amax(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Largest magnitude over `dim` (dropped; None: over all) as fp32. NaN is ignored, as by fmaxf; an empty set gives 0."""
    dim = tuple(range(x.dim())) if dim is None else dim
    if x.numel() == 0:
        return torch.zeros([size for axis, size in enumerate(x.shape) if axis not in dim], device=x.device)
    largest = _largest(x, dim)
    # CUDA pays a pass rather than a host synchronization; on CPU NaN is rare and the look at the result is nearly free.
    if x.is_cuda or bool(largest.isnan().any()):
        largest = _largest(torch.nan_to_num(x, nan=0.0, posinf=torch.inf, neginf=-torch.inf), dim)
    return largest.float()


def _largest(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Two reads of x, where x.abs() would write a copy of it."""
    return torch.maximum(x.amax(dim), x.amin(dim).neg()).abs()


def scale_of_amax(
    amax: Tensor, largest: float, *, pow2: bool = False, eps: float = 0.0, value_for_inf: float = FP32_MAX
) -> Tensor:
    """largest / amax in fp32, the factor which takes amax to the end of the format's range.

    amax: fp32, any shape. Below eps it counts as eps; 0, inf and NaN give 1. A quotient of inf becomes value_for_inf.
    pow2: floor to a power of two. The inverse stored beside the codes is 1 / scale.
    """
    raised = torch.where(amax < eps, eps, amax)
    # A Python number over a tensor is its reciprocal times the number in torch: two roundings where the rule has one.
    scale = torch.tensor(largest, device=amax.device) / raised
    scale = torch.where(scale == torch.inf, value_for_inf, scale)
    if pow2:
        scale = (scale.view(torch.int32) & _SIGN_AND_EXPONENT).view(torch.float32)
    return torch.where((raised == 0) | ~raised.isfinite(), 1.0, scale)


def e8m0_of_amax(amax: Tensor, largest: float) -> Tensor:
    """Biased exponent (uint8) of the MX block scale: ceil(log2(amax / largest)) + 127, inf -> 254, NaN -> 255."""
    quotient = amax * torch.tensor(1.0 / largest, dtype=torch.float32, device=amax.device)
    bits = quotient.view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    mantissa = bits & _MANTISSA
    # Subnormals up to 2^-127 are held by exponent 0; 254 is the last finite exponent.
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(quotient == torch.inf, 0xFE, exponent + up)
    return torch.where(quotient.isnan(), 0xFF, exponent).to(torch.uint8)


def e8m0_value(exponents: Tensor) -> Tensor:
    """fp32 2^(e - 127) of E8M0 bytes (uint8), exact down to 2^-127; 255 is NaN."""
    wide = exponents.to(torch.int32)
    bits = torch.where(wide == 0, 0x400000, wide << 23)
    return torch.where(wide == 0xFF, torch.nan, bits.view(torch.float32))


def e8m0_reciprocal(exponents: Tensor) -> Tensor:
    """fp32 2^(127 - e) of E8M0 bytes (uint8): what a block is multiplied by before its cast.

    Transformer Engine's kernel takes 1 for e = 0 and 0 for e = 254 instead: it flushes blocks whose amax is below 2^-118
    to zero, and differs for blocks that hold inf.
    """
    wide = 254 - exponents.to(torch.int32)
    bits = torch.where(wide == 0, 0x400000, wide << 23)
    return torch.where(wide < 0, torch.nan, bits.view(torch.float32))


class DelayedScale:
    """Scale of one tensor taken from the magnitudes of earlier steps (Transformer Engine's DelayedScaling).

    largest: of the element type (`Format.max`). history: steps remembered. margin: powers of two left free above amax.
    algorithm: `max` over the history or its `most_recent` entry. A step quantizes with `scale` (fp32 scalar, 1 at first),
    observes each amax, and ends with `update`. Ranks which share a tensor reduce `newest` by MAX before that.
    """

    def __init__(
        self,
        largest: float,
        *,
        history: int = 1,
        margin: int = 0,
        algorithm: str = "most_recent",
        device: torch.device | str | None = None,
    ) -> None:
        if history < 1:
            raise PrecisionError(f"DelayedScale: history is {history} steps; it must be at least 1")
        if algorithm not in ("max", "most_recent"):
            raise PrecisionError(f"DelayedScale: algorithm {algorithm!r} is unknown; use 'max' or 'most_recent'")
        self.largest = largest * 2.0**-margin
        self.algorithm = algorithm
        self.history = torch.zeros(history, device=device)
        self.scale = torch.ones((), device=device)

    @property
    def newest(self) -> Tensor:
        """fp32 scalar, a view into the history: the largest amax observed since the last update."""
        return self.history[0]

    def observe(self, amax: Tensor) -> None:
        """Take note of the magnitude of one tensor quantized in this step; the largest counts."""
        self.newest.copy_(torch.fmax(self.newest, amax))

    def update(self) -> None:
        """End the step: a new scale from the history, which then moves on by one unless nothing was observed."""
        seen = self.history.amax() if self.algorithm == "max" else self.newest
        usable = (seen > 0) & seen.isfinite()
        self.scale = torch.where(usable, scale_of_amax(seen, self.largest), self.scale)
        moved = self.history.roll(-1)
        moved[0] = 0
        self.history = torch.where(self.newest != 0, moved, self.history)

    def state_dict(self) -> dict[str, Tensor]:
        """History (fp32 [steps]) and scale (fp32 scalar), as copies."""
        return {"history": self.history.clone(), "scale": self.scale.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; the length of the history must agree."""
        if state["history"].shape != self.history.shape:
            found, wanted = len(state["history"]), len(self.history)
            raise PrecisionError(
                f"DelayedScale: the saved history has {found} steps, this one {wanted}; use the same length"
            )
        self.history.copy_(state["history"])
        self.scale = state["scale"].to(self.scale).clone()

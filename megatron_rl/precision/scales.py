"""Scales of low precision: from the largest magnitude (amax) to the factor that multiplies a tensor before its cast.

The rules are those of Transformer Engine's kernels (recipe_common.cuh), bit for bit; all arithmetic is fp32.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import PrecisionError

FP32_MAX = torch.finfo(torch.float32).max
_SIGN_AND_EXPONENT = -0x800000  # 0xFF800000 as int32: this mask clears the mantissa and so floors to a power of two
_MANTISSA = 0x7FFFFF


def amax(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Return the largest magnitude over `dim` as fp32, without these dimensions. `dim` None means all dimensions.

    NaN is ignored, as by fmaxf. The result for an empty tensor is 0.
    """
    dim = tuple(range(x.dim())) if dim is None else dim
    if x.numel() == 0:
        return torch.zeros([size for axis, size in enumerate(x.shape) if axis not in dim], device=x.device)
    largest = _largest(x, dim)
    # On CUDA the second pass always runs, because a check of the result would synchronize with the host. On CPU the
    # check costs almost nothing, and NaN is rare.
    if x.is_cuda or bool(largest.isnan().any()):
        largest = _largest(torch.nan_to_num(x, nan=0.0, posinf=torch.inf, neginf=-torch.inf), dim)
    return largest.float()


def _largest(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the largest magnitude. This reads x twice, whereas x.abs() would write a copy of it.

    One axis after the other, from the last one, takes half the time of all at once on a CPU.
    """
    high = low = x
    for axis in sorted(dim, reverse=True):
        high, low = high.amax(axis), low.amin(axis)
    return torch.maximum(high, low.neg()).abs()


def scale_of_amax(
    amax: Tensor, largest: float, *, pow2: bool = False, eps: float = 0.0, value_for_inf: float = FP32_MAX
) -> Tensor:
    """Return the scale largest / amax in fp32, which maps amax to the end of the format's range.

    The inverse that is stored with the codes is 1 / scale.

    Args:
        amax: fp32, any shape. 0, inf and NaN result in scale 1.
        largest: largest finite value of the element type.
        pow2: True to floor the scale to a power of two.
        eps: lower bound of amax.
        value_for_inf: scale to use if the quotient is inf.
    """
    raised = torch.where(amax < eps, eps, amax)
    # For number / tensor torch multiplies by the reciprocal. That rounds twice, but the rule rounds once.
    scale = torch.tensor(largest, device=amax.device) / raised
    scale = torch.where(scale == torch.inf, value_for_inf, scale)
    if pow2:
        scale = (scale.view(torch.int32) & _SIGN_AND_EXPONENT).view(torch.float32)
    return torch.where((raised == 0) | ~raised.isfinite(), 1.0, scale)


def e8m0_of_amax(amax: Tensor, largest: float) -> Tensor:
    """Return the biased exponent (uint8) of the MX block scale: ceil(log2(amax / largest)) + 127.

    inf becomes 254, NaN becomes 255.
    """
    quotient = amax * torch.tensor(1.0 / largest, dtype=torch.float32, device=amax.device)
    bits = quotient.view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    mantissa = bits & _MANTISSA
    # Exponent 0 stands for 2^-127, so subnormals up to 2^-127 are not rounded up. 254 is the last finite exponent.
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(quotient == torch.inf, 0xFE, exponent + up)
    return torch.where(quotient.isnan(), 0xFF, exponent).to(torch.uint8)


def e8m0_value(exponents: Tensor) -> Tensor:
    """Return fp32 2^(e - 127) of E8M0 bytes (uint8), exact down to 2^-127. 255 is NaN."""
    wide = exponents.to(torch.int32)
    bits = torch.where(wide == 0, 0x400000, wide << 23)
    return torch.where(wide == 0xFF, torch.nan, bits.view(torch.float32))


def e8m0_reciprocal(exponents: Tensor) -> Tensor:
    """Return fp32 2^(127 - e) of E8M0 bytes (uint8), the factor that multiplies a block before its cast.

    Transformer Engine's kernel uses 1 for e = 0 and 0 for e = 254 instead. It therefore flushes blocks whose amax is
    below 2^-118 to zero, and differs for blocks that hold inf.
    """
    wide = 254 - exponents.to(torch.int32)
    bits = torch.where(wide == 0, 0x400000, wide << 23)
    return torch.where(wide < 0, torch.nan, bits.view(torch.float32))


class DelayedScale:
    """Scale of one tensor from the magnitudes of previous steps (Transformer Engine's DelayedScaling).

    A step quantizes with `scale` (fp32 scalar, 1 at first), calls `observe` for every amax, and ends with `update`.
    Ranks that share a tensor all-reduce `newest` by MAX before `update`.
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
        """Start with scale 1 and an empty history.

        Args:
            largest: largest finite value of the element type (`Format.max`).
            history: number of steps in the history.
            margin: powers of two left free above amax.
            algorithm: `max` for the maximum of the history, `most_recent` for its newest entry.
            device: device of the history and the scale.
        """
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
        """The largest amax observed since the last update: fp32 scalar, a view into the history."""
        return self.history[0]

    def observe(self, amax: Tensor) -> None:
        """Record the amax of one tensor quantized in this step. Only the largest is kept."""
        self.newest.copy_(torch.fmax(self.newest, amax))

    def update(self) -> None:
        """End the step: compute the scale from the history, then shift the history by one step.

        The history is not shifted if nothing was observed.
        """
        seen = self.history.amax() if self.algorithm == "max" else self.newest
        usable = (seen > 0) & seen.isfinite()
        self.scale = torch.where(usable, scale_of_amax(seen, self.largest), self.scale)
        moved = self.history.roll(-1)
        moved[0] = 0
        self.history = torch.where(self.newest != 0, moved, self.history)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the history (fp32 [steps]) and of the scale (fp32 scalar)."""
        return {"history": self.history.clone(), "scale": self.scale.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`. Raise PrecisionError if its history has another length."""
        if state["history"].shape != self.history.shape:
            found, wanted = len(state["history"]), len(self.history)
            raise PrecisionError(
                f"DelayedScale: the saved history has {found} steps, this one {wanted}; use the same length"
            )
        self.history.copy_(state["history"])
        self.scale = state["scale"].to(self.scale).clone()

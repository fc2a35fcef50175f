"""Corrections for the mismatch between the engine's policy and the trainer's: a separate weight and mask per token.

With rho = pi_old / mu (the trainer's policy before the update over the engine's policy), a ratio objective's loss
becomes

    loss = weight x mask x loss of the method

The last correction, StaleMask, uses the age of a token instead of rho. Masked tokens still count in the norm, because
its counts are fixed before the forward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from megatron_rl.errors import ConfigError, did_you_mean
from megatron_rl.objectives.inputs import LossInputs
from megatron_rl.objectives.options import checked, choice, flag, nonnegative, positive


@dataclass(frozen=True, kw_only=True)
class Correction(ABC):
    """A weight, a mask, or both, that multiply the loss of a ratio objective.

    `apply(x, numerator)` returns (weight, mask, metrics): tensors [B, T] without gradient, None for a part that the
    correction does not have. `numerator` names the tensor of `x` above the fraction bar of rho: `logold`, or the
    current `logp` if the denominator of the objective is `rollout`.
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(
                self, option.name, checked(f"correction {self.name}", option, getattr(self, option.name))
            )

    @property
    def weighs(self) -> bool:
        """True if the loss is multiplied by rho; this is valid only if the ratio does not contain mu."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the tensors of LossInputs that are needed in addition to the numerator."""
        return frozenset({"logmu"})

    @property
    def prefix(self) -> str:
        """Prefix of the metrics' names; it marks the sequence level if the correction has levels."""
        return f"{self.name}_sequence" if getattr(self, "level", "token") == "sequence" else self.name

    @abstractmethod
    def apply(self, x: LossInputs, numerator: str) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class TIS(Correction):
    """Truncated importance sampling: weight min(rho, threshold)."""

    threshold: float = positive(2.0, "upper bound of the weight")
    level: str = choice("token", ("token", "sequence"), "rho of a token, or the product over its sequence")

    name: ClassVar = "tis"

    @property
    def weighs(self) -> bool:
        return True

    def apply(self, x: LossInputs, numerator: str) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        rho = _rho(x, numerator, self.level)
        weight = rho.clamp(max=self.threshold)
        return (
            weight,
            None,
            {
                f"{self.prefix}/weight": weight,
                f"{self.prefix}/truncated": (rho > self.threshold).to(rho.dtype),
            },
        )


@dataclass(frozen=True, kw_only=True)
class MIS(Correction):
    """Masked importance sampling: weight rho; tokens (or whole sequences) with rho above the threshold are masked.

    With weight false only the mask is used, as printed in arXiv 2603.19470.
    """

    threshold: float = positive(2.0, "rho above it is dropped")
    level: str = choice("token", ("token", "sequence"), "rho of a token, or the product over its sequence")
    weight: bool = flag(True, "multiply what is kept by rho")

    name: ClassVar = "mis"

    @property
    def weighs(self) -> bool:
        return self.weight

    def apply(self, x: LossInputs, numerator: str) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        rho = _rho(x, numerator, self.level)
        mask = (rho <= self.threshold).to(rho.dtype)
        return (rho if self.weight else None), mask, {f"{self.prefix}/masked": 1 - mask}


@dataclass(frozen=True, kw_only=True)
class IcePop(Correction):
    """Two-sided masking of tokens (arXiv 2510.18855): weight rho where low <= rho <= high, else masked."""

    low: float = positive(0.5, "rho below it is dropped")
    high: float = positive(5.0, "rho above it is dropped")
    weight: bool = flag(True, "multiply what is kept by rho")

    name: ClassVar = "icepop"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self.name, self.low, self.high)

    @property
    def weighs(self) -> bool:
        return self.weight

    def apply(self, x: LossInputs, numerator: str) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        rho = _rho(x, numerator, "token")
        mask = ((rho >= self.low) & (rho <= self.high)).to(rho.dtype)
        return (rho if self.weight else None), mask, {"icepop/masked": 1 - mask}


@dataclass(frozen=True, kw_only=True)
class GeoMask(Correction):
    """Mask for sequences whose geometric mean of rho is outside [low, high], whatever their length.

    It has no weight. There is no default for the bounds: they depend on the mismatch of engine and trainer, which the
    log reports under `mismatch/...`.
    """

    low: float | None = positive(None, "a mean below it drops the sequence")
    high: float | None = positive(None, "a mean above it drops the sequence")

    name: ClassVar = "geo_mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low is None or self.high is None:
            raise ConfigError("correction geo_mask needs both 'low' and 'high', the bounds of the geometric mean ratio")
        _check_range(self.name, self.low, self.high)

    def apply(self, x: LossInputs, numerator: str) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        assert self.low is not None and self.high is not None
        mean = _rho(x, numerator, "geometric")
        mask = ((mean >= self.low) & (mean <= self.high)).to(mean.dtype)
        return None, mask, {"geo_mask/masked": 1 - mask}


@dataclass(frozen=True, kw_only=True)
class StaleMask(Correction):
    """Mask for tokens sampled by weights more than `max_staleness` versions older than those the step trains from.

    It has no weight. This bound applies to the objective only; it is tighter than the bound that sampling keeps
    (rollout.max_staleness).
    """

    max_staleness: float = nonnegative(0.0, "versions; older tokens are dropped")

    name: ClassVar = "stale_mask"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"staleness"})

    def apply(self, x: LossInputs, numerator: str) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        assert x.staleness is not None
        mask = (x.staleness <= self.max_staleness).to(x.staleness.dtype)
        return None, mask, {"stale_mask/masked": 1 - mask}


CORRECTIONS: dict[str, type[Correction]] = {kind.name: kind for kind in (TIS, MIS, IcePop, GeoMask, StaleMask)}


def make_corrections(specs: Any) -> tuple[Correction, ...]:
    """Return the corrections of a list such as `[{name: tis, threshold: 2.0}, ...]`.

    Raises:
        ConfigError: an entry is invalid; the message names it and the nearest valid name.
    """
    if not isinstance(specs, (list, tuple)):
        raise ConfigError(f"corrections is {specs!r}; it must be a list of mappings, each with a name")
    return tuple(spec if isinstance(spec, Correction) else _make(i, spec) for i, spec in enumerate(specs))


def _make(index: int, spec: Any) -> Correction:
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"corrections[{index}] is {spec!r}; it must be a mapping such as {{name: tis, threshold: 2.0}}"
        )
    options = dict(spec)
    name = options.pop("name", None)
    if name not in CORRECTIONS:
        raise ConfigError(f"corrections[{index}]: unknown correction {name!r}; {did_you_mean(name, CORRECTIONS)}")
    keys = [f.name for f in fields(CORRECTIONS[name])]
    for key in options:
        if key not in keys:
            raise ConfigError(f"correction {name} has no key '{key}'; {did_you_mean(key, keys)}")
    return CORRECTIONS[name](**options)


def _rho(x: LossInputs, numerator: str, level: Any) -> Tensor:
    return x.ratio("logmu", level, numerator).detach()


def _check_range(name: str, low: float, high: float) -> None:
    if low >= high:
        raise ConfigError(f"correction {name}: low is {low:g} and high {high:g}; low must be the smaller one")

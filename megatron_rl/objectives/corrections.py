"""Corrections of the gap between the engine's policy and the trainer's: a weight and a mask per token, kept apart.

With rho = pi_old / mu, the trainer's policy before the update over the engine's, a ratio objective's loss becomes

    loss = weight x mask x loss of the method

The last one looks at the age of a token instead. Masked tokens keep counting in the norm, whose counts are fixed before
the forward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.objectives.inputs import LossInputs
from megatron_rl.objectives.options import checked, choice, flag, nonnegative, positive, suggest


@dataclass(frozen=True, kw_only=True)
class Correction(ABC):
    """`apply(x, numerator)` -> (weight, mask, metrics), tensors [B, T] without gradient, None where it has no such part.

    numerator: the tensor of x above the fraction bar of rho, `logold`; with denominator `rollout` the current `logp`.
    """

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(
                self, option.name, checked(f"correction {self.name}", option, getattr(self, option.name))
            )

    @property
    def weighs(self) -> bool:
        """True when the loss is multiplied by rho, which only a ratio without mu in it can bear."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """Tensors of LossInputs besides the numerator."""
        return frozenset({"logmu"})

    @property
    def prefix(self) -> str:
        """Of its metrics' names; one that has levels tells the sequence level apart."""
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
    """Masked importance sampling: weight rho, tokens (or whole sequences) with rho above the threshold dropped.

    weight: false keeps the mask alone, as arXiv 2603.19470 prints it.
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
    """Two-sided masking of tokens (arXiv 2510.18855): weight rho where low <= rho <= high, else dropped."""

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
    """Drop sequences whose geometric mean of rho leaves [low, high]: independent of their length. No weight.

    No default fits: the bounds depend on the mismatch of engine and trainer, whose own figure is `mismatch/...` in the log.
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
    """Drop tokens that weights sampled which are more than so many versions behind those the step trains from. No weight.

    A bound for the objective alone, below the one that sampling keeps (rollout.max_staleness).
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
    """From `[{name: tis, threshold: 2.0}, ...]`. Raises ConfigError naming the entry and the nearest valid name."""
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
        raise ConfigError(f"corrections[{index}]: unknown correction {name!r}; {suggest(name, CORRECTIONS)}")
    keys = [f.name for f in fields(CORRECTIONS[name])]
    for key in options:
        if key not in keys:
            raise ConfigError(f"correction {name} has no key '{key}'; {suggest(key, keys)}")
    return CORRECTIONS[name](**options)


def _rho(x: LossInputs, numerator: str, level: Any) -> Tensor:
    return x.ratio("logmu", level, numerator).detach()


def _check_range(name: str, low: float, high: float) -> None:
    if low >= high:
        raise ConfigError(f"correction {name}: low is {low:g} and high {high:g}; low must be the smaller one")

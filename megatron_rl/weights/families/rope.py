"""Rotary position embeddings as one plan: the inverse frequencies of every kind that Hugging Face models use.

The formulas and their order of operations are those of transformers' `modeling_rope_utils`, so the frequencies are
equal to the last bit. megatron-core's own scaling is not used: it fixes Llama's constants, and it ignores others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError


class Scaling(Protocol):
    """How the frequencies of plain RoPE are changed so that a model works at longer sequences."""

    @property
    def attention_factor(self) -> float:
        """Factor on cosines and sines."""

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        """Return the inverse frequencies, fp32, shape [dim / 2].

        Args:
            theta: base of the frequencies.
            dim: number of rotated dimensions of a head.
            length: length of the longest sequence, in tokens.
        """


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float) / dim


@dataclass(frozen=True, slots=True)
class Plain:
    """RoPE without scaling."""

    attention_factor: float = 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        return 1.0 / (theta ** _exponents(dim))


@dataclass(frozen=True, slots=True)
class Linear:
    """All frequencies are divided by one factor."""

    factor: float
    attention_factor: float = 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        return 1.0 / (theta ** _exponents(dim)) / self.factor


@dataclass(frozen=True, slots=True)
class Dynamic:
    """The base grows with sequences longer than `max_positions`. Shorter sequences see plain RoPE."""

    factor: float
    max_positions: int
    attention_factor: float = 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        longest = max(length, self.max_positions)
        stretch = (self.factor * longest / self.max_positions) - (self.factor - 1)
        base: float = theta * stretch ** (dim / (dim - 2))
        return 1.0 / (base ** _exponents(dim))


@dataclass(frozen=True, slots=True)
class Llama3:
    """Low frequencies are divided by a factor, high ones are kept, and those between are mixed (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int
    attention_factor: float = 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        plain = 1.0 / (theta ** _exponents(dim))
        low, high = self.original / self.low_freq_factor, self.original / self.high_freq_factor
        wavelength = 2 * math.pi / plain
        scaled = torch.where(wavelength > low, plain / self.factor, plain)
        smooth = (self.original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        mixed = (1 - smooth) * scaled / self.factor + smooth * scaled
        between = ~(wavelength < high) * ~(wavelength > low)
        return torch.where(between, mixed, scaled)


@dataclass(frozen=True, slots=True)
class Yarn:
    """Each frequency is interpolated by how often it turns within the original length (arXiv 2309.00071).

    With latent attention, `mscale_all_dim` also scales the scores.
    """

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    mscale_all_dim: float = 0.0

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        base = theta ** (torch.arange(0, dim, 2).to(torch.float) / dim)
        low, high = (self._dimension(turns, theta, dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        span = (high if low != high else high + 0.001) - low  # no division by 0
        kept = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / span, 0, 1)
        return 1.0 / (self.factor * base) * (1 - kept) + 1.0 / base * kept

    def _dimension(self, turns: float, theta: float, dim: int) -> float:
        return (dim * math.log(self.original / (turns * 2 * math.pi))) / (2 * math.log(theta))


@dataclass(frozen=True, slots=True)
class LongRope:
    """Each frequency has a divisor of its own, one set for short sequences and one for long ones (arXiv 2402.13753)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention_factor: float

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        divisors = torch.tensor(self.long if length > self.original else self.short, dtype=torch.float32)
        return 1.0 / (divisors * theta ** _exponents(dim))


@dataclass(frozen=True, slots=True)
class RopePlan:
    """How positions turn queries and keys.

    Attributes:
        theta: base of the frequencies.
        dim: number of rotated dimensions of a head.
        scaling: how the frequencies are changed for long sequences.
        interleaved: neighboring dimensions form a pair. Otherwise dimension i is paired with i + dim / 2.
    """

    theta: float
    dim: int
    scaling: Scaling = Plain()
    interleaved: bool = False

    @property
    def attention_factor(self) -> float:
        """Factor on cosines and sines."""
        return self.scaling.attention_factor

    def frequencies(self, length: int = 0) -> Tensor:
        """Return the inverse frequencies, fp32, shape [dim / 2], for sequences of up to `length` tokens."""
        return self.scaling.frequencies(self.theta, self.dim, length)


def read_scaling(kind: str, values: Mapping[str, Any], max_positions: int, where: str) -> Scaling:
    """Return the scaling that the RoPE part of a config.json asks for.

    Args:
        kind: the RoPE type.
        values: the part's other keys, without the type, the base and the rotated share.
        max_positions: `max_position_embeddings` of the model.
        where: file and key, for error messages.

    Raises:
        ConfigError: if the type is not known, or a key is missing, unknown or of the wrong type.
    """
    if kind not in _READERS:
        raise ConfigError(f"{where} asks for {kind!r} RoPE, which is not supported; supported: {', '.join(_READERS)}")
    given = _Values({key: value for key, value in values.items() if value is not None}, where)
    scaling = _READERS[kind](given, max_positions)
    given.finish(kind)
    return scaling


class _Values:
    """Keys of a RoPE part. Every key must be read."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self._values, self._where = values, where

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.pop(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self._where}: '{key}' is {value!r}, a positive number is needed")
        return value

    def optional(self, key: str) -> float | None:
        return self.number(key) if key in self._values else None

    def boolean(self, key: str, default: bool) -> bool:
        value = self._values.pop(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}: '{key}' is {value!r}, true or false is needed")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self._values.pop(key, None)
        if not isinstance(value, list) or not all(isinstance(part, (int, float)) for part in value):
            raise ConfigError(f"{self._where}: '{key}' is {value!r}, a list of numbers is needed")
        return tuple(value)

    def ignore(self, *keys: str) -> None:
        for key in keys:
            self._values.pop(key, None)

    def finish(self, kind: str) -> None:
        if self._values:
            key, value = next(iter(self._values.items()))
            raise ConfigError(
                f"{self._where}: '{key}' = {value!r} has no meaning for {kind!r} RoPE: is the type right?"
            )


def _plain(values: _Values, max_positions: int) -> Scaling:
    # Both are written by converters next to the default type. They have no effect in transformers.
    values.ignore("factor", "original_max_position_embeddings")
    return Plain()


def _linear(values: _Values, max_positions: int) -> Scaling:
    return Linear(values.number("factor"))


def _dynamic(values: _Values, max_positions: int) -> Scaling:
    values.ignore("original_max_position_embeddings")
    return Dynamic(values.number("factor"), max_positions)


def _llama3(values: _Values, max_positions: int) -> Scaling:
    low, high = values.number("low_freq_factor"), values.number("high_freq_factor")
    original = values.number("original_max_position_embeddings", max_positions)
    return Llama3(values.number("factor"), low, high, int(original))


def _yarn(values: _Values, max_positions: int) -> Scaling:
    original = int(values.number("original_max_position_embeddings", max_positions))
    factor = values.number("factor", max_positions / original)
    stated, mscale, all_dim = (values.optional(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None:
        attention = stated
    elif mscale and all_dim:
        attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    else:
        attention = yarn_mscale(factor, 1.0)
    fast, slow = values.number("beta_fast", 32), values.number("beta_slow", 1)
    return Yarn(factor, original, fast, slow, values.boolean("truncate", True), attention, all_dim or 0.0)


def yarn_mscale(factor: float, scale: float) -> float:
    """Return YaRN's factor on attention for a length that grew by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(values: _Values, max_positions: int) -> Scaling:
    original = int(values.number("original_max_position_embeddings", max_positions))
    factor = values.number("factor", max_positions / original)
    attention = values.optional("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(values.numbers("short_factor"), values.numbers("long_factor"), original, attention)


_READERS = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

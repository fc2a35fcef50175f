"""Confirming that an engine holds a weight version: by its version number, its digests, and a scored probe."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_rl.engines.control import Traits
from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import EngineError
from megatron_rl.weight_sync.expected_digests import SERVED_DTYPES, ExpectedDigests, first_difference

Digests = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ScoreProbe:
    """A fixed text with the trainer's scores of it.

    Attributes:
        tokens: the text, N tokens.
        logp: N - 1 log-probabilities of all tokens but the first, under the trainer's weights at temperature 1.
        tolerance: largest mean absolute difference of an engine's scores, in nats.
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...] = field(repr=False)
    tolerance: float


def has_expected_digests(traits: Traits) -> bool:
    """Return whether the digests that an engine reports can be computed from what is sent to it.

    They cannot on several ranks, on a GPU, or where the engine itself quantizes the weights.
    """
    return traits.embedded or (
        traits.device == "cpu" and traits.ranks == 1 and not traits.quantized and traits.dtype in SERVED_DTYPES
    )


def digests_for(expected: ExpectedDigests, traits: Traits) -> Digests | None:
    """Return the digests that an engine must report, None where they cannot be computed."""
    if traits.embedded:
        return expected.digests or None
    return expected.sglang(traits.dtype) if has_expected_digests(traits) else None


def confirm(engines: EnginePool, url: str, number: int, expected: ExpectedDigests, traits: Traits) -> None:
    """Check the version number of an engine, and its digests where they can be computed.

    Args:
        engines: the pool.
        url: the engine.
        number: the version that it must report.
        expected: digests of that version.
        traits: traits of the engine.

    Raises:
        EngineError: naming engine and tensor.
    """
    check_number(engines, url, number)
    digests = digests_for(expected, traits)
    if digests is not None:
        compare(url, number, engines.checksums(url), digests, expected)


def check_number(engines: EnginePool, url: str, number: int) -> None:
    """Raise EngineError unless the engine reports weight version `number`.

    Args:
        engines: the pool.
        url: the engine.
        number: the weight version.
    """
    reported = engines.weight_version(url)
    if reported != str(number):
        raise EngineError(f"{url} reports weight version '{reported}' after loading version {number}")


def compare(url: str, number: int, found: Digests, wanted: Digests, expected: ExpectedDigests | None) -> None:
    """Raise EngineError naming the first tensor whose digest differs.

    Args:
        url: the engine.
        number: the weight version, for the error.
        found: the engine's digests.
        wanted: the digests that it must have.
        expected: holds the bucket in which each tensor was sent; None if it was not sent in buckets.
    """
    difference = first_difference(found, wanted)
    if difference is not None:
        name, how = difference
        where = f"tensor '{name}'" if expected is None else expected.where(name)
        raise EngineError(f"{url}, weight version {number}: {where} {how}")


def check_probe(engines: EnginePool, url: str, number: int, probe: ScoreProbe | None) -> None:
    """Let a paused engine score the probe, and pause it again. Raises EngineError if its scores differ too much.

    Args:
        engines: the pool.
        url: the engine.
        number: the weight version, for the error.
        probe: the probe; None is an error.
    """
    if probe is None:
        raise EngineError(f"{url}: its weights can be confirmed by a probe alone, and none was given")
    engines.resume(url)
    try:
        logp = engines.score(url, probe.tokens)
    finally:
        engines.pause(url, "abort")
    off = sum(abs(a - b) for a, b in zip(logp, probe.logp, strict=True)) / len(probe.logp)
    if not off <= probe.tolerance:
        raise EngineError(
            f"{url}, weight version {number}: the log-probabilities of the probe are off by {off:.4g} on average, "
            f"{probe.tolerance:g} is allowed: the engine holds other weights than the trainer"
        )

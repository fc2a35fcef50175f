"""One weight update over all engines: every one confirms the new version, or all go back to the old one.

An engine confirms by naming the version and the digest of every tensor it holds; one whose digests cannot be foretold
(several ranks, a GPU, weights quantized by the engine) by the log-probabilities of a probe, by having the digests that
its like have, and by other digests than before wherever other bytes were sent. To score the probe it must generate, so
its requests are ended first, to be resumed with their prefix, and nothing is routed to it before it is confirmed.

An engine that can neither confirm the new version nor be brought back to the old one is dropped if it may hold anything,
or kept from being routed to until an update succeeds if it only lacks a way back. One whose memory was given back holds
nothing at first, so it takes an update like the others, but may have nothing to go back to.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from megatron_rl.errors import EngineError, MegatronRLError
from megatron_rl.weight_sync.expected_digests import Tally, first_difference
from megatron_rl.weight_sync.transports.transport import Engines as Delivering
from megatron_rl.weight_sync.transports.transport import Transport, each
from megatron_rl.weights.families.family import DTYPES
from megatron_rl.weights.quantized import is_scale

Digests = Mapping[str, str]


class Traits(Protocol):
    """What an engine says of itself; see `rollout.control.Traits`."""

    @property
    def embedded(self) -> bool: ...

    @property
    def ranks(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def quantized(self) -> bool: ...


class Engines(Delivering, Protocol):
    """The control calls of the rollout engines; each raises EngineError when the engine refuses or is gone."""

    @property
    def live_urls(self) -> Sequence[str]: ...

    @property
    def held(self) -> Mapping[str, str]: ...

    def traits(self, url: str) -> Traits: ...

    def drop_dead(self) -> None: ...

    def drop(self, url: str, reason: str) -> None: ...

    def hold(self, url: str, reason: str) -> None: ...

    def admit(self, url: str, version: int) -> None: ...

    def revive(self) -> Sequence[str]: ...

    def pause(self, url: str, mode: str) -> None: ...

    def resume(self, url: str) -> None: ...

    def weight_version(self, url: str) -> str: ...

    def holds_weights(self, url: str) -> bool: ...

    def checksums(self, url: str) -> Digests: ...

    def score(self, url: str, tokens: Sequence[int]) -> Sequence[float]: ...

    def flush(self, url: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Version:
    """Weights that engines serve. folder: from which they can be loaded; None where nothing but the engines holds them.
    tally: their digests; None for the folder the engines started from, which they may serve in another dtype. held: what
    engines whose digests cannot be foretold answered when they had confirmed it."""

    number: int
    folder: Path | None
    tally: Tally | None = field(repr=False)
    held: Mapping[str, Digests] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed text, its log-probabilities under the trainer's weights at temperature 1 (one fewer), and how far an engine's
    may be off on average."""

    tokens: tuple[int, ...]
    logp: tuple[float, ...] = field(repr=False)
    tolerance: float


class NoWayBack(EngineError):
    """The engine lives, but holds some of a version that failed, and the one before cannot be loaded again."""


class Transaction:
    """The update of all live engines from `old` to `number`. mode: of the pause; "in_place" keeps the cache of requests.

    held: after `run`, digests of the engines that a probe confirmed.
    """

    def __init__(
        self,
        engines: Engines,
        transport: Transport,
        tally: Tally,
        number: int,
        old: Version,
        *,
        traits: Mapping[str, Traits],
        mode: str = "retract",
        probe: Probe | None = None,
    ) -> None:
        self._engines, self._transport, self._tally = engines, transport, tally
        self._number, self._old, self._mode, self._probe = number, old, mode, probe
        self._traits, self._urls = traits, list(traits)
        self._lost: dict[str, EngineError] = {}
        self._before: Mapping[str, Digests] = {}
        self.held: Mapping[str, Digests] = {}
        self._unsure = [url for url in self._urls if not foretold(traits[url])]
        self._kept_out: list[str] = []

    def run(self) -> dict[str, str]:
        """Deliver what the transport has prepared, have it confirmed, and let generation go on.

        Returns engine -> reason for engines that were dropped because they confirmed the version but could not resume.
        Raises EngineError, with every engine on the old version again, held or dropped, when one did not confirm, naming
        engine and tensor; CheckpointError likewise when the weights themselves were at fault.
        """
        engines = self._engines
        self._stop()
        try:
            failed = self._transport.deliver(engines, {url: self._traits[url].ranks for url in self._urls})
        except BaseException as error:  # whatever went wrong here, engines are not to be left paused or half updated
            self._undo()
            state = self._give_up()
            if isinstance(error, MegatronRLError):
                raise type(error)(f"{error}. {state}") from error
            raise
        failed = failed or each(self._urls, self._confirm)[1] or self._confirm_by_probe()
        if failed:
            self._undo()
            self._abandon(failed)
        each(self._urls, lambda url: engines.admit(url, self._number))
        _, stuck = each(self._urls, engines.resume)
        dropped = {
            url: f"it holds weight version {self._number} but cannot resume: {error}" for url, error in stuck.items()
        }
        for url, reason in dropped.items():
            engines.drop(url, reason)
        if len(dropped) == len(self._urls):
            raise EngineError("no engine is left: " + "; ".join(f"{url}: {reason}" for url, reason in dropped.items()))
        return dropped

    def _stop(self) -> None:
        """Pause every engine, and note what it would have to go back to."""
        engines, urls = self._engines, self._urls
        holds, mute = each(urls, engines.holds_weights)
        empty = {
            url: EngineError(f"{url} held no weights before: its memory had been released")
            for url in urls
            if not holds.get(url, True)
        }
        # A version whose folder is known can be loaded into any engine.
        self._lost = {} if self._old.tally is not None and self._old.folder is not None else empty
        failed = mute
        if not failed:
            self._kept_out = [url for url in self._unsure if url not in engines.held]
            for url in self._kept_out:
                engines.hold(url, f"weight version {self._number} is not confirmed yet")
            failed = each(urls, lambda url: engines.pause(url, self._pause_mode(url)))[1]
        if not failed and self._old.tally is None:
            self._before, failed = each([url for url in urls if url not in empty], engines.checksums)
        if failed:
            self._transport.discard(engines, [])
            self._abandon(failed)

    def _pause_mode(self, url: str) -> str:
        return "abort" if url in self._unsure else self._mode

    # Confirmation ------------------------------------------------------------------------------------------------------

    def _confirm(self, url: str) -> None:
        if self._pause_mode(url) != "in_place":
            self._engines.flush(url)
        confirm(self._engines, url, self._number, self._tally, self._traits[url])

    def _confirm_by_probe(self) -> dict[str, EngineError]:
        """Of the engines whose digests cannot be foretold."""
        self.held, failed = each(self._unsure, self._engines.checksums)
        for url, digests in self.held.items():
            like = next(other for other in self.held if self._traits[other] == self._traits[url])
            try:
                compare(url, self._number, digests, self.held[like], self._tally)
            except EngineError as error:
                failed[url] = EngineError(f"{error} (compared with {like})")
        return failed or each(self._unsure, self._find_stale)[1] or each(self._unsure, self._try_probe)[1]

    def _find_stale(self, url: str) -> None:
        """EngineError where other bytes were sent than for the version before, and the engine holds what it held then.

        Not asked of an engine that quantizes what it is sent, for a small change may be lost in that; of one that is sent
        codes it is.
        """
        before, now, old = self._old.held.get(url), self.held[url], self._old.tally
        quantizes = self._traits[url].quantized and not any(map(is_scale, self._tally.digests))
        if before is None or old is None or quantizes:
            return
        same: dict[str, bool] = {}
        for key, digest in now.items():
            name = key.partition("@")[0]  # on every one of its ranks
            same[name] = same.get(name, True) and before.get(key) == digest
        for name in self._tally.changed_since(old):
            if same.get(name):
                raise EngineError(
                    f"{url}, weight version {self._number}: {self._tally.where(name)} was sent anew, and the engine holds what "
                    f"it held of version {self._old.number}"
                )

    def _try_probe(self, url: str) -> None:
        if self._probe is None:
            raise EngineError(f"{url}: its weights can be confirmed by a probe alone, and none was given")
        self._engines.resume(url)
        try:
            logp = self._engines.score(url, self._probe.tokens)
        finally:
            self._engines.pause(url, "abort")
        off = sum(abs(a - b) for a, b in zip(logp, self._probe.logp, strict=True)) / len(self._probe.logp)
        if not off <= self._probe.tolerance:
            raise EngineError(
                f"{url}, weight version {self._number}: the log-probabilities of the probe are off by {off:.4g} on average, "
                f"{self._probe.tolerance:g} is allowed: the engine holds other weights than the trainer"
            )

    # The way back ------------------------------------------------------------------------------------------------------

    def _undo(self) -> None:
        """Bring every engine that can be brought back to the old version; the others are in `_lost` afterwards."""
        engines = self._engines
        engines.drop_dead()
        alive = set(engines.live_urls)
        gone = {url: EngineError(f"{url} does not answer") for url in self._urls if url not in alive}
        self._transport.discard(engines, [url for url in self._urls if url in alive])
        back = [url for url in self._urls if url in alive and url not in self._lost]
        _, failed = each(back, self._bring_back)
        self._lost = {**self._lost, **gone, **failed}

    def _bring_back(self, url: str) -> None:
        engines, old, traits = self._engines, self._old, self._traits[url]
        in_buckets = self._transport.in_buckets
        if in_buckets and traits.embedded:
            engines.abort_update(url)  # back to what it served, whatever its name was
        elif old.folder is None:
            raise NoWayBack(
                f"{url} holds some of weight version {self._number}, and version {old.number} is in no folder"
            )
        else:
            if in_buckets:
                with suppress(EngineError):  # where it had not begun
                    engines.end_update(url)
            engines.update_weights_from_disk(url, old.folder, old.number)
            if self._mode != "in_place":
                engines.flush(url)
            check_number(engines, url, old.number)
        if old.tally is not None:
            confirm(engines, url, old.number, old.tally, traits)
        elif url in self._before:
            compare(url, old.number, engines.checksums(url), self._before[url], None)

    def _give_up(self) -> str:
        """Resume the engines that hold the old version, drop the others or keep them out; answers what became of them."""
        engines = self._engines
        alive = set(engines.live_urls)
        _, stuck = each([url for url in self._urls if url not in self._lost and url in alive], engines.resume)
        lost = {**self._lost, **stuck}
        held = {url: error for url, error in lost.items() if isinstance(error, NoWayBack)}
        for url, error in lost.items():
            if url in held:
                engines.hold(url, f"weight version {self._number} failed: {error}")
            elif url in alive:
                engines.drop(
                    url,
                    f"weight version {self._number} failed and the engine could not go back to the old version: {error}",
                )
        kept = [url for url in self._urls if url not in lost and url in alive]
        for url in self._kept_out:
            if url in kept:
                engines.admit(url, self._old.number)
        nobody = "no engine serves the old version" if held else "no engine is left"
        state = f"{', '.join(kept)} again serve(s) the old version" if kept else nobody
        dropped = [url for url in self._urls if url in lost and url not in held]
        state += f"; dropped: {', '.join(dropped)}" if dropped else ""
        return state + (f"; kept out until an update succeeds: {', '.join(held)}" if held else "")

    def _abandon(self, causes: Mapping[str, EngineError]) -> NoReturn:
        state = self._give_up()
        reasons = "; ".join(f"{url}: {error}" for url, error in causes.items())
        raise EngineError(f"weight version {self._number} is not served ({reasons}). {state}") from next(
            iter(causes.values())
        )


def expected_digests(tally: Tally, traits: Traits) -> Digests | None:
    """What `Engines.checksums` must answer for an engine that holds the tallied weights; None where that cannot be foretold."""
    if traits.embedded:
        return tally.digests or None
    return tally.sglang(traits.dtype) if foretold(traits) else None


def foretold(traits: Traits) -> bool:
    """Whether the digests that an engine gives can be computed from what is sent to it."""
    return traits.embedded or (
        traits.device == "cpu" and traits.ranks == 1 and not traits.quantized and traits.dtype in DTYPES
    )


def confirm(engines: Engines, url: str, number: int, tally: Tally, traits: Traits) -> None:
    """EngineError unless the engine names that version and, where they can be foretold, has those digests."""
    check_number(engines, url, number)
    expected = expected_digests(tally, traits)
    if expected is not None:
        compare(url, number, engines.checksums(url), expected, tally)


def check_number(engines: Engines, url: str, number: int) -> None:
    reported = engines.weight_version(url)
    if reported != str(number):
        raise EngineError(f"{url} reports weight version '{reported}' after loading version {number}")


def compare(url: str, number: int, held: Digests, expected: Digests, tally: Tally | None) -> None:
    difference = first_difference(held, expected)
    if difference is not None:
        name, how = difference
        where = f"tensor '{name}'" if tally is None else tally.where(name)
        raise EngineError(f"{url}, weight version {number}: {where} {how}")

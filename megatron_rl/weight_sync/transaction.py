"""One weight update over all engines: every engine confirms the new version, or all return to the old one.

An engine confirms by reporting the version and the digest of every tensor. If its digests cannot be computed, three
things are required instead: the scores of a probe within a tolerance, digests equal to those of an equal engine, and a
changed digest for every tensor that changed. An engine must generate to score the probe, so its requests are aborted
first, to be resumed from their prefix, and it is quarantined until it has confirmed.

An engine that can neither confirm nor return to the old version is lost. If it is healthy, and only the old version
cannot be loaded again, it is quarantined until an update succeeds. An offloaded engine holds nothing at first: it
takes an update like the others, but may have nothing to return to.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megatron_rl.engines.control import Traits
from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import EngineError, MegatronRLError
from megatron_rl.weight_sync.confirmation import (
    Digests,
    ScoreProbe,
    check_number,
    check_probe,
    compare,
    confirm,
    has_expected_digests,
)
from megatron_rl.weight_sync.expected_digests import ExpectedDigests
from megatron_rl.weight_sync.transports.transport import Transport, each
from megatron_rl.weights.quantized import is_scale


@dataclass(frozen=True, slots=True)
class Version:
    """Weights that engines serve.

    Attributes:
        number: the version number.
        folder: folder from which it can be loaded; None where only the engines hold it.
        expected: its digests; None for the folder that engines started from, which they may serve in another dtype.
        confirmed: digests that engines without computable digests reported when they confirmed it.
    """

    number: int
    folder: Path | None
    expected: ExpectedDigests | None = field(repr=False)
    confirmed: Mapping[str, Digests] = field(default_factory=dict, repr=False)


class CannotRestore(EngineError):
    """The engine is healthy, but holds a part of a failed version, and the version before cannot be loaded again."""


class Transaction:
    """The update of all live engines from one version to the next.

    Attributes:
        confirmed: after `run`, the digests of the engines that a probe confirmed.
    """

    def __init__(
        self,
        engines: EnginePool,
        transport: Transport,
        expected: ExpectedDigests,
        number: int,
        old: Version,
        *,
        traits: Mapping[str, Traits],
        mode: str = "retract",
        probe: ScoreProbe | None = None,
    ) -> None:
        """Prepare an update; `run` makes it.

        Args:
            engines: the pool.
            transport: has prepared the new version.
            expected: collects the digests of the new version while it is sent.
            number: number of the new version.
            old: the version that the engines serve.
            traits: traits of each engine to update, by URL.
            mode: mode of the pause, `rollout.update_mode`; "in_place" keeps the cache of requests.
            probe: probe for engines whose digests cannot be computed.
        """
        self._engines, self._transport, self._expected = engines, transport, expected
        self._number, self._old, self._mode, self._probe = number, old, mode, probe
        self._traits, self._urls = traits, list(traits)
        self._unrestored: dict[str, EngineError] = {}  # engines that cannot return to the old version
        self._checksums_before: Mapping[str, Digests] = {}
        self.confirmed: Mapping[str, Digests] = {}
        self._opaque = [url for url in self._urls if not has_expected_digests(traits[url])]
        self._quarantined: list[str] = []  # quarantined by this update alone

    def run(self) -> dict[str, str]:
        """Deliver the prepared version, have it confirmed, and resume generation.

        Returns:
            Engine -> reason for engines that are lost because they confirmed the version but could not resume.

        Raises:
            EngineError: naming engine and tensor, if an engine did not confirm. Every engine then serves the old
                version again, or is quarantined or lost.
            CheckpointError: the weights themselves are invalid. The state of the engines is the same as above.
        """
        engines = self._engines
        self._pause_all()
        try:
            failed = self._transport.deliver(engines, {url: self._traits[url].ranks for url in self._urls})
        except BaseException as error:  # no engine may stay paused or half updated, whatever went wrong
            self._roll_back()
            state = self._resume_restored()
            if isinstance(error, MegatronRLError):
                raise type(error)(f"{error}. {state}") from error
            raise
        failed = failed or each(self._urls, self._confirm)[1] or self._confirm_by_probe()
        if failed:
            self._roll_back()
            self._fail(failed)
        each(self._urls, lambda url: engines.admit(url, self._number))
        _, stuck = each(self._urls, engines.resume)
        lost = {
            url: f"it holds weight version {self._number} but cannot resume: {error}" for url, error in stuck.items()
        }
        for url, reason in lost.items():
            engines.mark_lost(url, reason)
        if len(lost) == len(self._urls):
            raise EngineError("no engine is left: " + "; ".join(f"{url}: {reason}" for url, reason in lost.items()))
        return lost

    def _pause_all(self) -> None:
        """Pause every engine, and note what it would have to return to."""
        engines, urls = self._engines, self._urls
        holds, failed = each(urls, engines.holds_weights)
        empty = {
            url: EngineError(f"{url} held no weights before: its memory had been released")
            for url in urls
            if not holds.get(url, True)
        }
        # A version whose folder is known can be loaded into any engine.
        self._unrestored = {} if self._old.expected is not None and self._old.folder is not None else empty
        if not failed:
            self._quarantined = [url for url in self._opaque if url not in engines.quarantined]
            for url in self._quarantined:
                engines.quarantine(url, f"weight version {self._number} is not confirmed yet")
            failed = each(urls, lambda url: engines.pause(url, self._pause_mode(url)))[1]
        if not failed and self._old.expected is None:
            self._checksums_before, failed = each([url for url in urls if url not in empty], engines.checksums)
        if failed:
            self._transport.discard(engines, [])
            self._fail(failed)

    def _pause_mode(self, url: str) -> str:
        return "abort" if url in self._opaque else self._mode

    # Confirmation ----------------------------------------------------------------------------------------------

    def _confirm(self, url: str) -> None:
        if self._pause_mode(url) != "in_place":
            self._engines.flush(url)
        confirm(self._engines, url, self._number, self._expected, self._traits[url])

    def _confirm_by_probe(self) -> dict[str, EngineError]:
        """Confirm the engines whose digests cannot be computed. Return what failed, by engine."""
        self.confirmed, failed = each(self._opaque, self._engines.checksums)
        for url, digests in self.confirmed.items():
            equal = next(other for other in self.confirmed if self._traits[other] == self._traits[url])
            try:
                compare(url, self._number, digests, self.confirmed[equal], self._expected)
            except EngineError as error:
                failed[url] = EngineError(f"{error} (compared with {equal})")
        if failed:
            return failed
        return (
            each(self._opaque, self._check_stale)[1]
            or each(self._opaque, lambda url: check_probe(self._engines, url, self._number, self._probe))[1]
        )

    def _check_stale(self, url: str) -> None:
        """Raise EngineError if other bytes were sent than for the version before, and the engine's digest is the same.

        An engine that quantizes what it receives is not checked, because a small change can vanish in that. An engine
        that receives codes is checked.
        """
        before, now, old = self._old.confirmed.get(url), self.confirmed[url], self._old.expected
        quantizes = self._traits[url].quantized and not any(map(is_scale, self._expected.digests))
        if before is None or old is None or quantizes:
            return
        same: dict[str, bool] = {}
        for key, digest in now.items():
            name = key.partition("@")[0]  # on every one of its ranks
            same[name] = same.get(name, True) and before.get(key) == digest
        for name in self._expected.changed_since(old):
            if same.get(name):
                raise EngineError(
                    f"{url}, weight version {self._number}: {self._expected.where(name)} was sent with new values, "
                    f"and the engine holds what it held of version {self._old.number}"
                )

    # Return to the old version ---------------------------------------------------------------------------------

    def _roll_back(self) -> None:
        """Restore the old version on every engine where that is possible. The others are then in `_unrestored`."""
        engines = self._engines
        engines.find_lost()
        alive = set(engines.live_urls)
        gone = {url: EngineError(f"{url} does not respond") for url in self._urls if url not in alive}
        self._transport.discard(engines, [url for url in self._urls if url in alive])
        restorable = [url for url in self._urls if url in alive and url not in self._unrestored]
        _, failed = each(restorable, self._restore)
        self._unrestored = {**self._unrestored, **gone, **failed}

    def _restore(self, url: str) -> None:
        engines, old, traits = self._engines, self._old, self._traits[url]
        in_buckets = self._transport.in_buckets
        if in_buckets and traits.embedded:
            engines.abort_update(url)  # the engine returns to what it served, under its old number
        elif old.folder is None:
            raise CannotRestore(
                f"{url} holds some of weight version {self._number}, and version {old.number} is in no folder"
            )
        else:
            if in_buckets:
                with suppress(EngineError):  # where the update had not begun
                    engines.end_update(url)
            engines.update_weights_from_disk(url, old.folder, old.number)
            if self._mode != "in_place":
                engines.flush(url)
            check_number(engines, url, old.number)
        if old.expected is not None:
            confirm(engines, url, old.number, old.expected, traits)
        elif url in self._checksums_before:
            compare(url, old.number, engines.checksums(url), self._checksums_before[url], None)

    def _resume_restored(self) -> str:
        """Resume the engines that hold the old version; drop or quarantine the others. Return their states as text."""
        engines = self._engines
        alive = set(engines.live_urls)
        _, stuck = each([url for url in self._urls if url not in self._unrestored and url in alive], engines.resume)
        failed = {**self._unrestored, **stuck}
        quarantined = {url: error for url, error in failed.items() if isinstance(error, CannotRestore)}
        for url, error in failed.items():
            if url in quarantined:
                engines.quarantine(url, f"weight version {self._number} failed: {error}")
            elif url in alive:
                engines.mark_lost(
                    url,
                    f"weight version {self._number} failed and the engine could not go back to the old version: "
                    f"{error}",
                )
        serving = [url for url in self._urls if url not in failed and url in alive]
        for url in self._quarantined:
            if url in serving:
                engines.admit(url, self._old.number)
        lost = [url for url in self._urls if url in failed and url not in quarantined]
        nobody = "no engine serves the old version" if quarantined else "no engine is left"
        state = f"{', '.join(serving)} again serve(s) the old version" if serving else nobody
        state += f"; lost: {', '.join(lost)}" if lost else ""
        return state + (f"; quarantined until an update succeeds: {', '.join(quarantined)}" if quarantined else "")

    def _fail(self, causes: Mapping[str, EngineError]) -> NoReturn:
        state = self._resume_restored()
        reasons = "; ".join(f"{url}: {error}" for url, error in causes.items())
        first = next(iter(causes.values()))
        raise EngineError(f"weight version {self._number} is not served ({reasons}). {state}") from first

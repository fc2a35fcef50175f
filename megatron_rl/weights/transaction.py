"""One weight update over all engines: every one confirms the new version, or all go back to the old one.

An engine confirms by naming the version and the digest of every tensor it holds. An engine that can neither confirm
the new version nor be brought back to the old one is dropped: it may hold anything. One whose memory was given back
holds nothing at first, so it takes an update like the others, but may have nothing to go back to.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_rl.errors import EngineError

T = TypeVar("T")
Digests = Mapping[str, str]


class Engines(Protocol):
    """The control calls of the rollout engines; each raises EngineError when the engine refuses or is gone."""

    @property
    def live_urls(self) -> Sequence[str]: ...

    def drop_dead(self) -> None: ...

    def pause(self, url: str, mode: str) -> None: ...

    def resume(self, url: str) -> None: ...

    def update_weights_from_disk(self, url: str, folder: Path, version: int) -> None: ...

    def weight_version(self, url: str) -> str: ...

    def holds_weights(self, url: str) -> bool: ...

    def checksums(self, url: str) -> Digests: ...

    def flush(self, url: str) -> None: ...

    def drop(self, url: str, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Version:
    """Weights an engine can load. digests: None for the folder the engines
    started from, which they may serve in another dtype."""

    number: int
    folder: Path
    digests: Digests | None = field(repr=False)


def update_engines(engines: Engines, new: Version, old: Version) -> dict[str, str]:
    """Move every live engine from `old` to `new`, paused meanwhile (running requests are requeued).

    A dead engine serves nothing and is dropped beforehand; one that dies on the way fails the update.

    Returns engine -> reason for engines that were dropped because they confirmed `new` but could not resume. Raises
    EngineError, with every engine on `old` again or dropped, when one did not confirm, naming engine and tensor.
    """
    engines.drop_dead()
    urls = list(engines.live_urls)
    if not urls:
        raise EngineError(f"weight version {new.number} has no engine to go to: every engine was dropped or none was started")
    holds, mute = _each(urls, engines.holds_weights)
    empty = {
        url: EngineError(f"{url} held no weights before: its memory had been released")
        for url in urls
        if not holds.get(url, True)
    }
    if mute:
        _abandon(engines, new, urls, empty, mute)
    _, unpaused = _each(urls, lambda url: engines.pause(url, "retract"))
    if unpaused:
        _abandon(engines, new, urls, empty, unpaused)
    before: Mapping[str, Digests] = {}
    if old.digests is None:
        before, silent = _each([url for url in urls if url not in empty], engines.checksums)
        if silent:
            _abandon(engines, new, urls, empty, silent)
    _, refused = _each(urls, lambda url: load_version(engines, url, new, new.digests))
    if refused:
        lost = {} if old.digests is not None else empty  # a version whose digests are known can be loaded into any engine
        back = [url for url in urls if url not in lost]
        _, failed = _each(back, lambda url: load_version(engines, url, old, old.digests or before[url]))
        _abandon(engines, new, urls, {**lost, **failed}, refused)
    _, stuck = _each(urls, engines.resume)
    dropped = {url: f"it holds weight version {new.number} but cannot resume: {error}" for url, error in stuck.items()}
    for url, reason in dropped.items():
        engines.drop(url, reason)
    if len(dropped) == len(urls):
        raise EngineError("no engine is left: " + "; ".join(f"{url}: {reason}" for url, reason in dropped.items()))
    return dropped


def load_version(engines: Engines, url: str, version: Version, digests: Digests | None) -> None:
    """Have one engine load `version`, drop what it cached, and confirm number and digests (None: the number only)."""
    engines.update_weights_from_disk(url, version.folder, version.number)
    engines.flush(url)
    reported = engines.weight_version(url)
    if reported != str(version.number):
        raise EngineError(f"{url} reports weight version '{reported}' after loading version {version.number}")
    if digests is not None:
        _compare(url, version.number, engines.checksums(url), digests)


def _compare(url: str, number: int, held: Digests, sent: Digests) -> None:
    for name, digest in sent.items():
        if held.get(name) != digest:
            found = f"digest {held[name]}" if name in held else "no such tensor"
            raise EngineError(
                f"{url}, weight version {number}: tensor '{name}' should have digest {digest}, the engine has {found}"
            )
    copies = set(sent.values())  # an engine may list a tied tensor under both names
    for name, digest in held.items():
        if name not in sent and digest not in copies:
            raise EngineError(
                f"{url}, weight version {number}: the engine holds tensor '{name}', which was not sent and may be stale"
            )


def _abandon(
    engines: Engines, new: Version, urls: Sequence[str], lost: Mapping[str, EngineError], causes: Mapping[str, EngineError]
) -> None:
    """Resume the engines that hold the old version, drop the others, and raise EngineError with the causes."""
    _, stuck = _each([url for url in urls if url not in lost], engines.resume)
    dropped = {**lost, **stuck}
    for url, error in dropped.items():
        engines.drop(url, f"weight version {new.number} failed and the engine could not go back to the old version: {error}")
    kept = [url for url in urls if url not in dropped]
    state = f"{', '.join(kept)} again serve(s) the old version" if kept else "no engine is left"
    if dropped:
        state += f"; dropped: {', '.join(dropped)}"
    reasons = "; ".join(f"{url}: {error}" for url, error in causes.items())
    raise EngineError(f"weight version {new.number} is not served ({reasons}). {state}") from next(iter(causes.values()))


def _each(urls: Sequence[str], call: Callable[[str], T]) -> tuple[dict[str, T], dict[str, EngineError]]:
    """Call every engine at the same time: engine -> result, and engine -> error."""

    def attempt(url: str) -> T | EngineError:
        try:
            return call(url)
        except EngineError as error:
            return error

    if not urls:
        return {}, {}
    with ThreadPoolExecutor(max_workers=len(urls)) as threads:
        outcomes = dict(zip(urls, threads.map(attempt, urls), strict=True))
    errors = {url: outcome for url, outcome in outcomes.items() if isinstance(outcome, EngineError)}
    return {url: outcome for url, outcome in outcomes.items() if not isinstance(outcome, EngineError)}, errors

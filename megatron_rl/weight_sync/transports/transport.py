"""What a transport is, and what those that send buckets have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import EngineError
from megatron_rl.protocol.buckets import Bucket, Buckets
from megatron_rl.weight_sync.expected_digests import ExpectedDigests

T = TypeVar("T")
Stream = Iterator[tuple[str, Tensor]]


class Transport(ABC):
    """Brings one version after another to engines. `prepare`, `deliver`, then `commit` or `discard`; `close` at the end.

    in_buckets: engines take the weights piece by piece, so that a failure may leave one with some of both versions.
    """

    in_buckets = True

    @abstractmethod
    def prepare(self, stream: Stream, version: int, expected: ExpectedDigests) -> None:
        """While the engines still generate. CheckpointError when the weights cannot be made ready; no engine was touched."""

    @abstractmethod
    def deliver(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        """Give the prepared version to paused engines. ranks: of each engine's url. Returns what failed, by engine.

        CheckpointError when the stream ends with an error of its own. Every tensor of the version is then in the expected.
        """

    def commit(self) -> Path | None:
        """Every engine confirmed. The folder from which the version can be loaded again, where there is one."""
        return None

    @abstractmethod
    def discard(self, engines: EnginePool, urls: Sequence[str]) -> None:
        """The version is given up. Engines that were left waiting for it are set free."""

    @abstractmethod
    def close(self, engines: EnginePool | None) -> None:
        """Give back what was held between the updates."""


class BucketTransport(Transport):
    """Begin, buckets, end. Of the two buckets held, each half of `bucket_bytes`, one travels and is digested while the other
    is filled."""

    def __init__(self, bucket_bytes: int) -> None:
        self._buckets = Buckets(bucket_bytes, self.memory)
        self._pending: tuple[Stream, int, ExpectedDigests] | None = None

    def prepare(self, stream: Stream, version: int, expected: ExpectedDigests) -> None:
        self._pending = (stream, version, expected)

    def deliver(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        assert self._pending is not None
        (stream, version, expected), self._pending = self._pending, None
        failed = self.connect(engines, ranks) or each(ranks, lambda url: _begin(engines, url))[1]
        if failed:
            return failed
        with ThreadPoolExecutor(1, thread_name_prefix="send") as sending, ThreadPoolExecutor(1, "digests") as digesting:
            sent: Future[dict[str, EngineError]] | None = None
            for bucket in self._buckets.fill(stream):  # the next one, while the last one travels
                failed = sent.result() if sent is not None else {}
                if failed:
                    return failed
                digested = digesting.submit(expected.add_bucket, bucket)
                sent = sending.submit(self._sent, engines, ranks, bucket, version, digested)
            failed = sent.result() if sent is not None else {}
        return failed or each(ranks, engines.end_update)[1]

    def _sent(
        self, engines: EnginePool, ranks: Mapping[str, int], bucket: Bucket, version: int, digested: "Future[None]"
    ) -> dict[str, EngineError]:
        failed = self.send(engines, ranks, bucket, version if bucket.last else None)
        digested.result()
        return {url: EngineError(f"{bucket} did not arrive: {error}") for url, error in failed.items()}

    @abstractmethod
    def memory(self, nbytes: int, device: torch.device) -> Tensor:
        """uint8 memory for buckets."""

    def connect(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        """Be ready to send to exactly these engines. What failed, by engine."""
        return {}

    @abstractmethod
    def send(
        self, engines: EnginePool, ranks: Mapping[str, int], bucket: Bucket, version: int | None
    ) -> dict[str, EngineError]:
        """To all engines; returns when all have it, or with what failed. version: with the last bucket."""


def _begin(engines: EnginePool, url: str) -> None:
    """Also where an update was left open, by a trainer that was killed say."""
    try:
        engines.begin_update(url)
    except EngineError:
        for close in (engines.abort_update, engines.end_update):  # the embedded engine's way, SGLang's way
            with suppress(EngineError):
                close(url)
                break
        engines.begin_update(url)


def each(
    urls: Mapping[str, object] | Sequence[str], call: Callable[[str], T]
) -> tuple[dict[str, T], dict[str, EngineError]]:
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

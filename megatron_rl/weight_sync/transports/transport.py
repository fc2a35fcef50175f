"""Interface of a transport, and the common part of the transports that send buckets."""

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
    """A way to send weight versions to engines.

    For each version call `prepare`, `deliver`, then `commit` or `discard`. Call `close` at the end.

    Attributes:
        in_buckets: engines receive the weights in parts, so a failure may leave an engine with a mix of two versions.
    """

    in_buckets = True

    @abstractmethod
    def prepare(self, stream: Stream, version: int, expected: ExpectedDigests) -> None:
        """Prepare a version while the engines still generate.

        Args:
            stream: names and tensors of the version.
            version: the version number.
            expected: collects the digests of the version.

        Raises:
            CheckpointError: if the weights cannot be prepared. No engine was changed.
        """

    @abstractmethod
    def deliver(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        """Send the prepared version to paused engines. Return the errors, by engine.

        Without an error, `expected` of `prepare` then holds every tensor of the version. `ranks` is engine URL ->
        number of ranks. Raises CheckpointError if the stream raises it.
        """

    def commit(self) -> Path | None:
        """Commit the version after every engine confirmed it. Return the folder that holds it, None without one."""
        return None

    @abstractmethod
    def discard(self, engines: EnginePool, urls: Sequence[str]) -> None:
        """Discard the version. Engines that still wait for a part of it are released."""

    @abstractmethod
    def close(self, engines: EnginePool | None) -> None:
        """Release the resources that are kept between updates."""


class BucketTransport(Transport):
    """A transport that begins an update, sends buckets, and ends it.

    It has two buckets, each half of `bucket_bytes`. One is sent and digested while the other is filled.
    """

    def __init__(self, bucket_bytes: int) -> None:
        self._buckets = Buckets(bucket_bytes, self.memory)
        self._pending: tuple[Stream, int, ExpectedDigests] | None = None

    def prepare(self, stream: Stream, version: int, expected: ExpectedDigests) -> None:
        """Keep the stream; its tensors are read in `deliver`. See `Transport.prepare` for the arguments."""
        self._pending = (stream, version, expected)

    def deliver(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        """Send all buckets to paused engines. Return the errors, by engine."""
        assert self._pending is not None
        (stream, version, expected), self._pending = self._pending, None
        failed = self.connect(engines, ranks) or each(ranks, lambda url: _begin(engines, url))[1]
        if failed:
            return failed
        with ThreadPoolExecutor(1, thread_name_prefix="send") as sending, ThreadPoolExecutor(1, "digests") as digesting:
            sent: Future[dict[str, EngineError]] | None = None
            for bucket in self._buckets.fill(stream):  # fills the next bucket while the last one is sent
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
        """Return [nbytes] uint8 memory for buckets."""

    def connect(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        """Prepare to send to exactly these engines. Return the errors, by engine."""
        return {}

    @abstractmethod
    def send(
        self, engines: EnginePool, ranks: Mapping[str, int], bucket: Bucket, version: int | None
    ) -> dict[str, EngineError]:
        """Send a bucket to all engines. Return when all have it, or after an error.

        Args:
            engines: the pool.
            ranks: engine URL -> number of ranks.
            bucket: the bucket.
            version: the version number with the last bucket, None with the others.

        Returns:
            The errors, by engine.
        """


def _begin(engines: EnginePool, url: str) -> None:
    """Begin an update, also if a killed trainer left one open."""
    try:
        engines.begin_update(url)
    except EngineError:
        for close in (engines.abort_update, engines.end_update):  # for the embedded engine, for SGLang
            with suppress(EngineError):
                close(url)
                break
        engines.begin_update(url)


def each(
    urls: Mapping[str, object] | Sequence[str], call: Callable[[str], T]
) -> tuple[dict[str, T], dict[str, EngineError]]:
    """Call every engine at the same time. Return engine -> result, and engine -> error."""

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

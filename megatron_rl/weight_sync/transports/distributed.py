"""Transport by broadcast from the trainer's rank 0 to every process of every engine: gloo on CPU, NCCL on a GPU.

NCCL does not report that an engine refuses or is lost. So before each broadcast of a watched group every engine must
respond, and after a failure the group is aborted.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import EngineError
from megatron_rl.protocol.api_key import is_loopback
from megatron_rl.protocol.buckets import Bucket
from megatron_rl.protocol.update_group import JOIN_S, UpdateGroup, create_store, local_address_for
from megatron_rl.weight_sync.transports.transport import BucketTransport, each

T = TypeVar("T")

_GRACE_S = 1.0  # time for the engines of a failed broadcast to respond before our part is stopped


class DistributedTransport(BucketTransport):
    """Transport over a process group with the engines. It is made again if the engines change or an update fails."""

    def __init__(self, bucket_bytes: int, timeout_s: float, device: torch.device) -> None:
        """Set the options; the group is made at the first update.

        Args:
            bucket_bytes: bytes of the two buckets together.
            timeout_s: seconds for one broadcast.
            device: device of the buckets; a CUDA device selects NCCL.
        """
        super().__init__(bucket_bytes)
        self._timeout_s, self._device = timeout_s, device
        self._group: UpdateGroup | None = None
        self._name, self._members = "", {}  # type: ignore[var-annotated]

    def memory(self, nbytes: int, device: torch.device) -> Tensor:
        """Return [nbytes] uint8 memory on `device`."""
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def connect(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        """Make the process group with exactly these engines, if it is not made yet. Return the errors, by engine."""
        if self._group is not None and self._members == dict(ranks):
            return {}
        self._leave(engines, [url for url in self._members if url in ranks])  # the other engines have ended
        self._name, self._members = f"weights-{secrets.token_hex(8)}", dict(ranks)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        address = _meeting_place({local_address_for(url) for url in ranks})
        store, world = create_store(JOIN_S, address), 1 + sum(ranks.values())
        first = dict(zip(ranks, _first_ranks(ranks), strict=True))

        def invite(url: str) -> None:
            place = {"rank": first[url], "world": world, "name": self._name, "backend": backend}
            engines.join_update_group(url, address, store.port, **place)  # type: ignore[arg-type]

        def join() -> UpdateGroup:
            timeout_s = max(self._timeout_s, JOIN_S)
            return UpdateGroup.join(self._name, store, rank=0, world=world, backend=backend, timeout_s=timeout_s)

        group, failed = _together(join, {url: lambda url=url: invite(url) for url in ranks})  # type: ignore[misc]
        self._group = group
        return failed

    def send(
        self, engines: EnginePool, ranks: Mapping[str, int], bucket: Bucket, version: int | None
    ) -> dict[str, EngineError]:
        """Broadcast a bucket to all engines. Return the errors, by engine. See `BucketTransport.send`."""
        group = self._group
        assert group is not None
        if group.watched and (failed := each(ranks, engines.weight_version)[1]):
            return failed

        def receive(url: str) -> None:
            engines.receive_bucket(url, self._name, bucket.names, bucket.dtypes, bucket.shapes, version)

        def free(url: str) -> None:
            # The engine refused, so it waits for nothing. When it leaves the group, our broadcast to it ends.
            engines.leave_update_group(url, self._name)

        calls = {url: lambda url=url: receive(url) for url in ranks}
        _, failed = _together(
            lambda: group.broadcast(bucket.data),
            calls,
            lambda: group.leave(abort=True),
            free,
            stop_ours=group.watched,
        )
        return failed

    def discard(self, engines: EnginePool, urls: Sequence[str]) -> None:
        """Leave the group, so that no engine waits in a broadcast."""
        self._leave(engines, urls, failed=True)

    def close(self, engines: EnginePool | None) -> None:
        """Leave the group and release the memory of the buckets."""
        self._leave(engines, list(self._members))
        self._buckets.free()

    def _leave(self, engines: EnginePool | None, urls: Sequence[str], *, failed: bool = False) -> None:
        """Leave the group. Closing our side releases every engine that waits in a broadcast, if one `failed`."""
        group, self._group = self._group, None
        if group is not None:
            group.leave(abort=failed)
        if engines is not None and self._name:
            # An error is ignored: the engine may have left already.
            each(list(urls), lambda url: engines.leave_update_group(url, self._name))
        self._name, self._members = "", {}


def _meeting_place(addresses: set[str]) -> str:
    """Return the address of this machine on which all engines can meet.

    An engine of this machine also reaches the address that others reach. Raises EngineError if there are several.
    """
    beyond = sorted(address for address in addresses if not is_loopback(address))
    if len(beyond) > 1:
        raise EngineError(
            f"engines reach this machine at several addresses ({', '.join(beyond)}), and an update group meets at one: "
            "give them URLs in one network, or set rollout.transport: disk"
        )
    return beyond[0] if beyond else sorted(addresses)[0]


def _first_ranks(ranks: Mapping[str, int]) -> list[int]:
    firsts, at = [], 1
    for size in ranks.values():
        firsts.append(at)
        at += size
    return firsts


def _together(
    local: Callable[[], T],
    calls: Mapping[str, Callable[[], None]],
    stop: Callable[[], None] = lambda: None,
    free: Callable[[str], None] = lambda url: None,
    *,
    stop_ours: bool = False,
) -> tuple[T | None, dict[str, EngineError]]:
    """Run our part of a collective, and the requests that let the engines run theirs, at the same time.

    Args:
        local: our part. It runs on a separate thread. If nothing else ends it, the thread runs until its own timeout.
        calls: engine -> request.
        stop: closes our connections after our part failed, so that no engine waits.
        free: lets an engine close its connection after it refused its request. Without this our part would wait
            forever.
        stop_ours: call `stop` also while our part still runs: nothing else ends it.

    Returns:
        The result of our part (None if it failed), and the errors, by engine.
    """
    ours: Future[T] = Future()
    Thread(target=_settle, args=(ours, local), name="collective", daemon=True).start()
    failed: dict[str, EngineError] = {}
    with ThreadPoolExecutor(len(calls)) as threads:
        replies = {threads.submit(call): url for url, call in calls.items()}
        left: set[Future[Any]] = {ours, *replies}
        while left and not failed and not (ours.done() and ours.exception()):
            done, left = wait(left, return_when=FIRST_COMPLETED)
            failed |= _failures(done, replies)
        for url in failed:
            with suppress(EngineError):
                free(url)
        if left:
            # An engine that fails by itself caused the error. One that fails because we left did not.
            done, left = wait(left, timeout=_GRACE_S)
            failed |= _failures(done, replies)
        if left and (ours.done() or stop_ours):
            stop()
            done, _ = wait(left)
            failed = failed or _failures(done, replies)
    if not ours.done():
        return None, failed
    error = ours.exception()
    if error is not None and not isinstance(error, EngineError):
        raise error
    if error is not None:
        return None, failed or dict.fromkeys(calls, error)
    return ours.result(), failed


def _settle(future: "Future[T]", work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001  a thread boundary: the waiting caller must get the error
        future.set_exception(error)


def _failures(done: set[Future[Any]], replies: Mapping[Future[None], str]) -> dict[str, EngineError]:
    found = {}
    for future in done:
        error = future.exception()
        if future in replies and isinstance(error, EngineError):
            found[replies[future]] = error
        elif future in replies and error is not None:
            raise error
    return found

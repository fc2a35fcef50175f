"""Weights by broadcast from the trainer's rank 0 to every process of every engine: gloo on CPU, NCCL on a GPU."""

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
from megatron_rl.protocol.buckets import Bucket
from megatron_rl.protocol.update_group import JOIN_S, UpdateGroup, create_store, local_address_for
from megatron_rl.weight_sync.transports.transport import BucketTransport, each

T = TypeVar("T")

_GRACE_S = 1.0  # time in which the engines of a failed broadcast answer by themselves


class DistributedTransport(BucketTransport):
    """One process group for a set of engines, made when the set changes or an update failed. timeout_s: of one broadcast."""

    def __init__(self, bucket_bytes: int, timeout_s: float, device: torch.device) -> None:
        super().__init__(bucket_bytes)
        self._timeout_s, self._device = timeout_s, device
        self._group: UpdateGroup | None = None
        self._name, self._members = "", {}  # type: ignore[var-annotated]

    def memory(self, nbytes: int, device: torch.device) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def connect(self, engines: EnginePool, ranks: Mapping[str, int]) -> dict[str, EngineError]:
        if self._group is not None and self._members == dict(ranks):
            return {}
        self._leave(engines, [url for url in self._members if url in ranks])  # the others are gone
        self._name, self._members = f"weights-{secrets.token_hex(8)}", dict(ranks)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        store, world = create_store(JOIN_S), 1 + sum(ranks.values())
        first = dict(zip(ranks, _first_ranks(ranks), strict=True))

        def invite(url: str) -> None:
            place = {"rank": first[url], "world": world, "name": self._name, "backend": backend}
            engines.join_update_group(url, local_address_for(url), store.port, **place)  # type: ignore[arg-type]

        def join() -> UpdateGroup:
            timeout_s = max(self._timeout_s, JOIN_S)
            return UpdateGroup.join(self._name, store, rank=0, world=world, backend=backend, timeout_s=timeout_s)

        group, failed = _together(join, {url: lambda url=url: invite(url) for url in ranks})  # type: ignore[misc]
        self._group = group
        return failed

    def send(
        self, engines: EnginePool, ranks: Mapping[str, int], bucket: Bucket, version: int | None
    ) -> dict[str, EngineError]:
        group = self._group
        assert group is not None

        def receive(url: str) -> None:
            engines.receive_bucket(url, self._name, bucket.names, bucket.dtypes, bucket.shapes, version)

        def free(url: str) -> None:
            # It refused, so it waits for nothing. When it leaves the group, our broadcast to it ends too.
            engines.leave_update_group(url, self._name)

        calls = {url: lambda url=url: receive(url) for url in ranks}
        _, failed = _together(lambda: group.broadcast(bucket.data), calls, group.leave, free)
        return failed

    def discard(self, engines: EnginePool, urls: Sequence[str]) -> None:
        self._leave(engines, urls)

    def close(self, engines: EnginePool | None) -> None:
        self._leave(engines, list(self._members))
        self._buckets.free()

    def _leave(self, engines: EnginePool | None, urls: Sequence[str]) -> None:
        """Closing our end frees every engine that waits in a broadcast."""
        group, self._group = self._group, None
        if group is not None:
            group.leave()
        if engines is not None and self._name:
            each(list(urls), lambda url: engines.leave_update_group(url, self._name))  # it may have left already
        self._name, self._members = "", {}


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
) -> tuple[T | None, dict[str, EngineError]]:
    """Our part of a collective and the requests that make engines take theirs; the result, and what failed, by engine.

    A request that is refused would leave our part waiting for ever: `free` makes that engine close its connection. When
    our part failed, `stop` closes ours, so that no engine waits. Our part runs on a thread that is left behind, until its
    own time-out, if nothing else ends it.
    """
    ours: Future[T] = Future()
    Thread(target=_settle, args=(ours, local), name="collective", daemon=True).start()
    failed: dict[str, EngineError] = {}
    with ThreadPoolExecutor(len(calls)) as threads:
        answers = {threads.submit(call): url for url, call in calls.items()}
        left: set[Future[Any]] = {ours, *answers}
        while left and not failed and not (ours.done() and ours.exception()):
            done, left = wait(left, return_when=FIRST_COMPLETED)
            failed |= _failures(done, answers)
        for url in failed:
            with suppress(EngineError):
                free(url)
        if left:
            done, left = wait(
                left, timeout=_GRACE_S
            )  # who fails by itself is to blame, who fails by our leaving is not
            failed |= _failures(done, answers)
        if left and ours.done():
            stop()
            done, _ = wait(left)
            failed = failed or _failures(done, answers)
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
    except BaseException as error:  # noqa: BLE001  a thread boundary: whoever waits must hear of it
        future.set_exception(error)


def _failures(done: set[Future[Any]], answers: Mapping[Future[None], str]) -> dict[str, EngineError]:
    found = {}
    for future in done:
        error = future.exception()
        if future in answers and isinstance(error, EngineError):
            found[answers[future]] = error
        elif future in answers and error is not None:
            raise error
    return found

"""With NCCL, an engine that does not respond is found before a broadcast that would wait for it."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rl.errors import EngineError
from megatron_rl.protocol.buckets import Bucket, TensorSlot
from megatron_rl.weight_sync.transports import distributed
from megatron_rl.weight_sync.transports.distributed import DistributedTransport

BUCKET = Bucket(0, (TensorSlot("w", torch.uint8, (4,), 0),), torch.zeros(4, dtype=torch.uint8), last=True)


class Engines:
    """Engines that respond, but for those that are gone or refuse the bucket."""

    def __init__(self, gone: Sequence[str] = (), refusing: Sequence[str] = ()) -> None:
        self.gone, self.refusing, self.left, self.asked = gone, refusing, [], []

    def weight_version(self, url: str) -> str:
        if url in self.gone:
            raise EngineError(f"{url} is gone")
        return "1"

    def receive_bucket(self, url: str, *_: Any) -> None:
        self.asked.append(url)
        if url in self.refusing:
            raise EngineError(f"{url} refuses")

    def leave_update_group(self, url: str, name: str) -> None:
        self.left.append(url)


class Group:
    """A group whose broadcast waits until it is left, as with NCCL if a member never comes."""

    def __init__(self, *, watched: bool) -> None:
        self.watched, self.begun, self._left = watched, False, threading.Event()

    def broadcast(self, data: torch.Tensor) -> None:
        self.begun = True
        if not self._left.wait(20):
            raise TimeoutError
        raise EngineError("the update group was left during the broadcast")

    def leave(self, *, abort: bool = False) -> None:
        assert abort
        self._left.set()


def transport(group: Group) -> Any:
    made: Any = DistributedTransport(1024, 5.0, torch.device("cpu"))
    made._group = group
    return made


def test_an_engine_that_is_gone_is_found_before_the_broadcast():
    group, engines = Group(watched=True), Engines(gone=["http://b"])
    failed = transport(group).send(engines, {"http://a": 1, "http://b": 1}, BUCKET, 1)
    assert list(failed) == ["http://b"] and not group.begun and not engines.asked


def test_a_broadcast_that_an_engine_refuses_is_aborted(monkeypatch):
    monkeypatch.setattr(distributed, "_GRACE_S", 0.05)
    group, engines = Group(watched=True), Engines(refusing=["http://b"])
    began = time.monotonic()
    failed = transport(group).send(engines, {"http://a": 1, "http://b": 1}, BUCKET, 1)
    assert list(failed) == ["http://b"] and group.begun and engines.left == ["http://b"]
    assert time.monotonic() - began < 15, "the broadcast was not aborted"

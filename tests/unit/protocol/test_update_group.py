"""The store of an update group listens where the engines are, and nowhere else."""

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_rl.errors import EngineError
from megatron_rl.protocol.update_group import UpdateGroup, connect_store, create_store
from megatron_rl.weight_sync.transports.distributed import _meeting_place


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_store_listens_on_one_address(address):
    store = create_store(10, address)
    listening = {c.laddr.ip for c in psutil.Process().net_connections() if c.laddr.port == store.port and not c.raddr}
    assert listening == {address}
    other = connect_store(address, store.port, 2, 10)
    other.set("key", "value")
    assert store.get("key") == b"value"


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(EngineError, match=r"no update group can meet on 192\.0\.2\.1 of this machine"):
        create_store(1, "192.0.2.1")


def test_engines_meet_at_the_address_that_all_of_them_reach():
    assert _meeting_place({"127.0.0.1"}) == "127.0.0.1"
    assert _meeting_place({"127.0.0.1", "10.0.0.5"}) == "10.0.0.5"
    with pytest.raises(EngineError, match=r"several addresses \(10\.0\.0\.5, 10\.1\.0\.5\)"):
        _meeting_place({"10.0.0.5", "10.1.0.5", "127.0.0.1"})


@pytest.fixture
def watched() -> Iterator[tuple[UpdateGroup, dist.ProcessGroup]]:
    """A group that is watched as with NCCL, over gloo, and its other member."""
    store = create_store(10)
    others: list[dist.ProcessGroup] = []

    def other() -> None:
        own = connect_store("127.0.0.1", store.port, 2, 10)  # a store's own connection serves one caller at a time
        place = dist.PrefixStore("cpu/", dist.PrefixStore("watched/", dist.PrefixStore("watched", own)))
        others.append(dist.ProcessGroupGloo(place, 1, 2, timedelta(seconds=3)))

    thread = threading.Thread(target=other)
    thread.start()
    group = UpdateGroup.join(
        "watched", store, rank=0, world=2, backend="gloo", timeout_s=3
    )  # gloo ends no broadcast earlier
    thread.join()
    group.watched = True
    yield group, others[0]
    group.leave(abort=True)


def test_a_watched_broadcast_is_over_when_every_member_has_the_bytes(watched):
    group, other = watched
    received, options = torch.zeros(4, dtype=torch.uint8), dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    work = other.broadcast([received], options)
    group.broadcast(torch.arange(4, dtype=torch.uint8))
    work.wait()
    assert received.tolist() == [0, 1, 2, 3]


def test_a_watched_broadcast_that_a_member_never_joins_ends_when_the_group_is_left(watched):
    group, _ = watched
    errors: list[EngineError] = []

    def send() -> None:
        try:
            group.broadcast(torch.zeros(1 << 24, dtype=torch.uint8))
        except EngineError as error:
            errors.append(error)

    sending = threading.Thread(target=send)
    sending.start()
    time.sleep(0.2)
    assert sending.is_alive()
    group.leave(abort=True)
    sending.join(10)
    assert not sending.is_alive() and len(errors) == 1


def test_a_watched_broadcast_that_a_member_never_joins_ends_after_its_time(watched):
    group, _ = watched
    group._timeout_s = 0.2
    with pytest.raises(EngineError, match=r"the broadcast (was not over within 0\.2 s|failed)"):
        group.broadcast(torch.zeros(1 << 24, dtype=torch.uint8))
    with pytest.raises(EngineError, match="was left"):
        group.broadcast(torch.zeros(1, dtype=torch.uint8))


def test_the_watchdog_of_nccl_is_off_while_a_group_is_made_and_only_then(monkeypatch):
    seen = []
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")

    def helper(*args: object, **keys: object) -> None:
        seen.append(os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"])
        raise RuntimeError("no group")

    monkeypatch.setattr(dist.distributed_c10d, "_new_process_group_helper", helper)
    with pytest.raises(EngineError, match="no group"):
        UpdateGroup.join("any", dist.HashStore(), rank=0, world=2, backend="gloo", timeout_s=1)
    assert seen == ["0"] and os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"

"""The process group in which weights are broadcast: the trainer's rank 0 and every process of every engine.

The group is outside of the trainer's own world. It is created in the same way as in SGLang, so that both sides find
each other.

With gloo a broadcast fails if a member leaves, and `wait` returns when it is over. NCCL has neither property: `wait`
returns at once, a member that never comes blocks the others, and torch's watchdog ends the process after the timeout.
So a `watched` group asks whether the broadcast is over until it is, or until the group is left or the time is up; then
the group is aborted, which ends what runs on the GPU.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_rl.errors import EngineError, first_line

_WAITING = 1024  # connections that wait to be accepted
JOIN_S = 60.0  # seconds in which all members must join
_POLL_S = 0.0005
_WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class UpdateGroup:
    """A joined group. Rank 0 sends. `leave` closes the connections, whatever the other members do."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float, *, watched: bool) -> None:
        self._group: dist.ProcessGroup | None = group
        self._timeout_s, self.watched = timeout_s, watched

    @classmethod
    def join(
        cls, name: str, store: dist.Store, *, rank: int, world: int, backend: str, timeout_s: float
    ) -> "UpdateGroup":
        """Join the group. Return when all `world` members have joined.

        Args:
            name: name of the group, the same for all members.
            store: store where the members meet.
            rank: rank of this member.
            world: number of members.
            backend: torch.distributed backend.
            timeout_s: time limit of the group, in seconds.

        Raises:
            EngineError: if not all members joined in time.
        """
        timeout = timedelta(seconds=timeout_s)
        try:
            with _without_watchdog():
                group, _ = distributed_c10d._new_process_group_helper(
                    world,
                    rank,
                    [],
                    dist.Backend(backend),
                    dist.PrefixStore(name, store),
                    group_name=distributed_c10d.GroupName(name),
                    timeout=timeout,
                )
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"update group '{name}' of {world} members was not completed: {first_line(error)}"
            ) from error
        distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
        return cls(group, timeout_s, watched=backend == "nccl")

    def broadcast(self, data: Tensor) -> None:
        """Broadcast rank 0's bytes. On other ranks, `data` is overwritten in place.

        Raises:
            EngineError: if a member is gone or does not take part in time.
        """
        if self._group is None:
            raise EngineError("the update group was left")
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            work = self._group.broadcast([data], options)
            if self.watched:
                self._watch(work)
            else:
                work.wait()
        except RuntimeError as error:
            raise EngineError(f"the broadcast failed: {first_line(error)}") from error

    def _watch(self, work: Any) -> None:
        """Return when `work` is over. Raises EngineError if it fails, the time is up, or another thread leaves."""
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if self._group is None:
                raise EngineError("the update group was left during the broadcast")
            if time.monotonic() > deadline:
                self.leave(abort=True)
                raise EngineError(f"the broadcast was not over within {self._timeout_s:g} s")
            time.sleep(_POLL_S)
        work.wait()  # raises the error of a broadcast that failed, and orders what follows on the stream

    def leave(self, *, abort: bool = False) -> None:
        """Close the connections. With `abort`, a broadcast that runs in a watched group ends at once."""
        group, self._group = self._group, None
        if group is None:
            return
        if abort and self.watched:
            distributed_c10d._abort_process_group(group)  # destroying it would wait for the broadcast
        else:
            dist.destroy_process_group(group)


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Create groups whose watchdog of NCCL ends no process. torch reads the variable when a group is created."""
    before = os.environ.get(_WATCHDOG)
    os.environ[_WATCHDOG] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WATCHDOG]
        else:
            os.environ[_WATCHDOG] = before


def create_store(timeout_s: float, address: str = "127.0.0.1") -> dist.TCPStore:
    """Return the store where a group meets, on a free port of one address of this machine.

    A store listens on all interfaces by itself, and knows no authentication.

    Args:
        timeout_s: time limit in seconds.
        address: address of this machine.

    Raises:
        EngineError: nothing can listen on the address.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.bind(place)
        listener.listen(_WAITING)
    except OSError as error:
        raise EngineError(f"no update group can meet on {address} of this machine ({error})") from error
    port = listener.getsockname()[1]
    # The store owns the socket from now on.
    return dist.TCPStore(address, port, None, True, limit, wait_for_workers=False, master_listen_fd=listener.detach())


def connect_store(address: str, port: int, world: int, timeout_s: float) -> dist.TCPStore:
    """Connect to the store of a group.

    Args:
        address: address of the machine that hosts the store.
        port: port of the store.
        world: number of members of the group.
        timeout_s: time limit in seconds.

    Raises:
        EngineError: if no store listens there.
    """
    try:
        return dist.TCPStore(address, port, world, False, timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"no update group at {address}:{port}: {first_line(error)}") from error


def local_address_for(url: str) -> str:
    """Return this machine's address as the engine at `url` reaches it.

    The address is loopback for an engine of this machine whose URL is loopback.
    """
    parts = urlsplit(url)
    try:
        family, kind, _, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # on a datagram socket this chooses the route and sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(f"{url}: no route to this engine ({error})") from error

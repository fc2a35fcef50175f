"""The process group in which weights are broadcast: the trainer's rank 0 and every process of every engine.

The group is outside of the trainer's own world. It is created in the same way as in SGLang, so that both sides find
each other.
"""

import socket
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_rl.errors import EngineError, first_line

_WAITING = 1024  # connections that wait to be accepted
JOIN_S = 60.0  # seconds in which all members must join


class UpdateGroup:
    """A joined group. Rank 0 sends. `leave` closes the connections, whatever the other members do."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group: dist.ProcessGroup | None = group

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
        return cls(group)

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
            self._group.broadcast([data], options).wait()
        except RuntimeError as error:
            raise EngineError(f"the broadcast failed: {first_line(error)}") from error

    def leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)


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

"""Weights on their way to another process: filled into buckets and broadcast, or mapped and copied. No engine is in it.

Buckets, group and payload are those of a run's transports `distributed` and `tensor`. The time of a version ends when
the other process has every byte in memory of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from megatron_rl.protocol.buckets import Bucket, Buckets
from megatron_rl.protocol.payload import pack_payload, shared_buffer, unpack_payload
from megatron_rl.protocol.update_group import UpdateGroup, connect_store, create_store

TIMEOUT_S = 60.0
Named = list[tuple[str, Tensor]]
Send = Callable[[Bucket], Any]


@contextmanager
def broadcasts(weights: Named, bucket_bytes: int, receiver: torch.device) -> Iterator[Callable[[], None]]:
    """Yield a function that broadcasts a version of the weights: NCCL from a GPU to another one, gloo on a CPU.

    Args:
        weights: names and tensors.
        bucket_bytes: bytes of the two buckets together.
        receiver: device of the other process.
    """
    store = create_store(TIMEOUT_S)
    buckets = Buckets(bucket_bytes, lambda nbytes, device: torch.empty(nbytes, dtype=torch.uint8, device=device))
    with _peer(_receive_broadcasts, store.port, receiver) as pipe:
        group = _join(store, 0, receiver)

        def send(bucket: Bucket) -> None:
            pipe.send(bucket.data.numel())
            group.broadcast(bucket.data)

        yield _version(weights, buckets, send, pipe)
        group.leave()


@contextmanager
def mappings(weights: Named, bucket_bytes: int) -> Iterator[Callable[[], None]]:
    """Yield a function that lets a process of the same device map and copy a version of the weights.

    Args:
        weights: names and tensors.
        bucket_bytes: bytes of the two buckets together.
    """
    buckets, device = Buckets(bucket_bytes, shared_buffer), weights[0][1].device

    def send(bucket: Bucket) -> None:
        _wait_for(device)
        pipe.send(pack_payload(bucket))

    with _peer(_receive_mappings, device) as pipe:
        version = _version(weights, buckets, send, pipe)

        def send_all() -> None:
            version()
            if buckets.on_gpu:  # as the transport does: torch keeps a record of every share of a buffer
                buckets.free()
                torch.cuda.ipc_collect()

        yield send_all


@contextmanager
def _peer(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """Yield the connection to a process that receives until it gets None."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()  # so that a peer that ends is an EOFError here
    yield ours
    ours.send(None)
    process.join(TIMEOUT_S)


def _version(weights: Named, buckets: Buckets, send: Send, pipe: Connection) -> Callable[[], None]:
    """Return a function that sends all weights. The first version is checked: every bucket has arrived as it was."""
    checked = False

    def version() -> None:
        nonlocal checked
        for bucket in buckets.fill(weights):
            send(bucket)
            pipe.send(not checked)
            arrived = pipe.recv()
            if not checked and arrived != _checksum(bucket.data):
                raise RuntimeError(f"{bucket} did not arrive as it was sent")
        checked = True

    return version


def _receive_broadcasts(pipe: Connection, port: int, device: torch.device) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = _join(connect_store("127.0.0.1", port, 2, TIMEOUT_S), 1, device)
    room = torch.empty(0, dtype=torch.uint8, device=device)
    while (nbytes := pipe.recv()) is not None:
        if room.numel() < nbytes:
            room = torch.empty(nbytes, dtype=torch.uint8, device=device)
        group.broadcast(room[:nbytes])
        _confirm(pipe, room[:nbytes])
    group.leave()


def _receive_mappings(pipe: Connection, device: torch.device) -> None:
    torch.set_num_threads(1)
    room = torch.empty(0, dtype=torch.uint8, device=device)
    while (payload := pipe.recv()) is not None:
        room = _copied(payload, room)
        _confirm(pipe, room)


def _copied(payload: str, room: Tensor) -> Tensor:
    """Return a bucket's bytes in memory of this process: `room` if it has the right size. No mapped tensor is kept."""
    pieces = [tensor.reshape(-1).view(torch.uint8) for _, tensor in unpack_payload(payload)]
    nbytes = sum(piece.numel() for piece in pieces)
    return torch.cat(pieces, out=room if room.numel() == nbytes else room.new_empty(nbytes))


def _confirm(pipe: Connection, data: Tensor) -> None:
    """Confirm that the bytes are here. Send their sum if the sender wants it."""
    _wait_for(data.device)
    pipe.send(_checksum(data) if pipe.recv() else None)


def _checksum(data: Tensor) -> int:
    return int(data.sum(dtype=torch.int64))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _join(store: Any, rank: int, device: torch.device) -> UpdateGroup:
    backend = "nccl" if device.type == "cuda" else "gloo"
    return UpdateGroup.join("benchmark", store, rank=rank, world=2, backend=backend, timeout_s=TIMEOUT_S)

"""Weight updates that the embedded engine receives in buckets.

The new weights are kept next to the served ones until the update is complete.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_rl.errors import EngineError, first_line
from megatron_rl.protocol.buckets import TensorSlot, bucket_layout, views
from megatron_rl.protocol.update_group import JOIN_S, UpdateGroup, connect_store
from megatron_rl.server.model_weights import Weights
from megatron_rl.weights.digest import tensor_digest
from megatron_rl.weights.quantized import is_scale


class PendingUpdate:
    """One update in progress: the tensors received so far, and their digests.

    The digests are computed while the next tensors arrive.

    Args:
        shapes: shapes of the model's own tensors. Tensors other than these (and tied ones, and the scales of codes) are
            refused.
        tied: names of weights that repeat another one.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], tied: Iterable[str]) -> None:
        self.version: str | None = None
        self.tensors: dict[str, Tensor] = {}
        self._shapes, self._tied = shapes, frozenset(tied)
        self._digests: dict[str, Future[str]] = {}
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="digests")

    def check(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """Check that tensors can belong to this update, before any of their data is received.

        Raises:
            EngineError: if a tensor is unknown, has another shape, or comes twice.
        """
        seen: set[str] = set()
        for name, shape in zip(names, shapes, strict=True):
            if name in self.tensors or name in seen:
                raise EngineError(f"tensor {name} comes twice in one update")
            seen.add(name)
            expected = self._shapes.get(name)
            if expected is None and name not in self._tied and not is_scale(name):
                raise EngineError(f"tensor {name} is unknown to the model")
            if expected is not None and tuple(shape) != expected:
                raise EngineError(f"tensor {name} has shape {tuple(shape)}, the model wants {expected}")

    def keep(self, tensors: Iterable[tuple[str, Tensor]], version: str | None) -> None:
        """Take over tensors. No other code may use their memory."""
        self.version = version or self.version
        for name, tensor in tensors:
            self.tensors[name] = tensor
            self._digests[name] = self._hashing.submit(tensor_digest, tensor)

    def digests(self) -> dict[str, str]:
        return {name: digest.result() for name, digest in self._digests.items()}

    def close(self) -> None:
        self._hashing.shutdown(wait=False, cancel_futures=True)


class UpdateGroups:
    """The update groups this engine has joined, by name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None
        self._groups: dict[str, UpdateGroup] = {}
        self._lock = threading.Lock()

    def join(self, name: str, address: str, port: int, *, rank: int, world: int, backend: str) -> None:
        """Join an update group.

        Args:
            name: name of the group.
            address: host of the group's store.
            port: port of the store.
            rank: rank of this engine in the group.
            world: number of members of the group.
            backend: torch.distributed backend.

        Raises:
            EngineError: the group was joined before, or cannot be joined in time.
        """
        if name in self._groups:
            raise EngineError(f"update group '{name}' was joined before: leave it first")
        store = connect_store(address, port, world, JOIN_S)
        group = UpdateGroup.join(name, store, rank=rank, world=world, backend=backend, timeout_s=JOIN_S)
        with self._lock:
            self._groups[name] = group

    def leave(self, name: str) -> None:
        """Leave an update group. Raises EngineError if it was not joined."""
        with self._lock:
            group = self._groups.pop(name, None)
        if group is None:
            raise EngineError(f"update group '{name}' was not joined")
        if not self._groups:
            self._buffer = None
        group.leave()

    def leave_all(self) -> None:
        """Leave every update group."""
        for name in list(self._groups):
            self.leave(name)

    def receive(
        self,
        name: str,
        names: Sequence[str],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[Sequence[int]],
        *,
        flat: bool,
    ) -> list[tuple[str, Tensor]]:
        """Receive the tensors of one broadcast, in memory of their own.

        Args:
            name: name of the update group.
            names: names of the tensors.
            dtypes: their dtypes.
            shapes: their shapes.
            flat: one bucket holds all tensors. Otherwise there is one broadcast per tensor.

        Raises:
            EngineError: if the group was not joined, or if the tensors are not a valid bucket.
        """
        group = self._groups.get(name)
        if group is None:
            raise EngineError(f"update group '{name}' was not joined: POST /init_weights_update_group first")
        if not flat:
            return [self._receive_one(group, *entry) for entry in zip(names, dtypes, shapes, strict=True)]
        try:
            pieces, nbytes = bucket_layout(names, dtypes, shapes)
        except ValueError as error:
            raise EngineError(f"these tensors make no flattened bucket: {error}") from error
        data = self._room(nbytes)
        group.broadcast(data)
        return [(name, tensor.clone()) for name, tensor in views(data, pieces)]

    def _receive_one(
        self, group: UpdateGroup, name: str, dtype: torch.dtype, shape: Sequence[int]
    ) -> tuple[str, Tensor]:
        piece = TensorSlot(name, dtype, tuple(shape), 0)
        data = self._room(piece.nbytes)
        group.broadcast(data)
        _, tensor = next(views(data, [piece]))
        return name, tensor.clone()

    def _room(self, nbytes: int) -> Tensor:
        """Return a buffer that is reused for every bucket.

        New memory costs more than a copy out of this buffer, because its pages are touched one by one.
        """
        if self._buffer is None or self._buffer.numel() < nbytes:
            self._buffer = None
            try:
                self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            except (RuntimeError, MemoryError, OverflowError) as error:
                raise EngineError(f"no memory for {nbytes >> 20} MiB of tensors: {first_line(error)}") from error
        return self._buffer[:nbytes]


class WeightUpdates:
    """The updates of one engine. Each one begins, is filled by buckets, and is served or discarded as a whole.

    Args:
        begin: makes an empty PendingUpdate.
        build: makes a model of the tensors and digests of a complete update.
        swap: serves a model and returns what was served before. It returns None if that must not be kept, because the
            engine generates meanwhile or held nothing.
        groups: the update groups of the engine.
    """

    def __init__(
        self,
        begin: Callable[[], PendingUpdate],
        build: Callable[[dict[str, Tensor], dict[str, str]], Weights],
        swap: Callable[[Weights, str], tuple[Weights, str] | None],
        groups: UpdateGroups,
    ) -> None:
        self._begin, self._build, self._swap, self.groups = begin, build, swap, groups
        self._open: PendingUpdate | None = None
        self._before: tuple[Weights, str] | None = None
        self._lock = threading.Lock()  # one call at a time

    def begin(self) -> None:
        with self._lock:
            if self._open is not None:
                raise EngineError("a weight update is under way: POST /end_weight_update or /abort_weight_update first")
            self._before, self._open = None, self._begin()

    def receive(
        self,
        group: str,
        names: Sequence[str],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[Sequence[int]],
        *,
        flat: bool,
        version: str | None,
    ) -> None:
        """Take part in the broadcast of these tensors.

        Args:
            group: name of the update group.
            names: names of the tensors.
            dtypes: their dtypes.
            shapes: their shapes.
            flat: one bucket holds all tensors. Otherwise there is one broadcast per tensor.
            version: version of the update, if this call states it.

        Raises:
            EngineError: before the broadcast begins, if the tensors cannot be taken.
        """
        with self._lock:
            update = self._under_way("/update_weights_from_distributed")
            update.check(names, shapes)
            update.keep(self.groups.receive(group, names, dtypes, shapes, flat=flat), version)

    def load(self, tensors: Sequence[tuple[str, Tensor]], version: str | None) -> None:
        """Copy tensors out of another process's memory."""
        with self._lock:
            update = self._under_way("/update_weights_from_tensor")
            update.check([name for name, _ in tensors], [tensor.shape for _, tensor in tensors])
            update.keep(((name, tensor.clone()) for name, tensor in tensors), version)

    def end(self) -> None:
        """Serve the update.

        Raises:
            EngineError, CheckpointError: if the update is incomplete. It is then discarded.
        """
        with self._lock:
            update, self._open = self._under_way("/end_weight_update"), None
            try:
                if not update.tensors:
                    return  # no tensor was received, so nothing changes
                if update.version is None:
                    raise EngineError("field 'weight_version': no bucket of the update named it")
                self._before = self._swap(self._build(update.tensors, update.digests()), update.version)
            finally:
                update.close()

    def abort(self) -> None:
        """Discard the update in progress.

        If an update is already served and the engine is still paused, serve the previous weights again.
        """
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None
            if self._before is not None:
                self._swap(*self._before)
                self._before = None

    def settle(self) -> None:
        """Discard the previous weights, because generation resumes. They cannot be restored any more."""
        former, self._before = [self._before], None
        threading.Thread(target=former.clear, daemon=True).start()  # releasing the memory takes time

    def _under_way(self, path: str) -> PendingUpdate:
        if self._open is None:
            raise EngineError(f"{path} without an update: POST /begin_weight_update first")
        return self._open

"""Memory of the trainer that engines on the same GPU may use while they generate: gradients, masters and moments."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class TrainerMemory:
    """Frees gradients and optimizer state on the device, and allocates them again with the same content.

    Gradients are not kept: every update begins with empty buffers. Master weights and moments go to pinned memory of
    the host. Parameters stay, because they are exported to the engines.

    megatron-core's `offload_to_cpu` is not used. It copies to new pageable memory in each turn, and it moves float32
    parameters, which are the model's own, away from their gradients.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any) -> None:
        """Set the model chunks, wrapped for data parallelism, and megatron-core's optimizer; nothing is freed."""
        self._chunks, self._optimizer = chunks, optimizer
        self._gradients: list[tuple[Tensor, int]] = []
        self._states: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._pinned: dict[int, list[Tensor]] = {}  # by size: memory of the host for the next release

    @property
    def held(self) -> bool:
        """Whether the device holds the memory."""
        return not self._gradients

    def release(self) -> int:
        """Free the memory. Return its size in bytes; 0 if it is free already."""
        if not self.held:
            return 0
        self._gradients = [
            (buffer.grad_data, buffer.grad_data.untyped_storage().nbytes()) for buffer in self._buffers()
        ]
        self._states = [(storage, self._copied(storage)) for storage in self._storages()]
        _synchronize()
        for gradients, _ in self._gradients:
            gradients.untyped_storage().resize_(0)
        for storage, _ in self._states:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return sum(size for _, size in self._gradients) + sum(kept.nbytes for _, kept in self._states)

    def restore(self) -> None:
        """Allocate the memory again: zero gradients, and the optimizer state as it was. Do nothing if it is held."""
        for gradients, size in self._gradients:
            gradients.untyped_storage().resize_(size)
            gradients.zero_()
        for storage, kept in self._states:
            storage.resize_(kept.nbytes)
            _bytes(storage).copy_(kept, non_blocking=True)
        _synchronize()
        for _, kept in self._states:
            self._pinned.setdefault(kept.nbytes, []).append(kept)
        self._gradients, self._states = [], []

    def _copied(self, storage: torch.UntypedStorage) -> Tensor:
        size, pins = storage.nbytes(), storage.device.type == "cuda"
        free = self._pinned.get(size)
        kept = free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=pins)
        return kept.copy_(_bytes(storage), non_blocking=True)

    def _buffers(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from (*chunk.buffers, *chunk.expert_parallel_buffers)

    def _storages(self) -> Iterator[torch.UntypedStorage]:
        """Yield the memory of the optimizer's tensors, each piece once, but what holds parameters of the model."""
        seen = {parameter.untyped_storage().data_ptr() for chunk in self._chunks for parameter in chunk.parameters()}
        for part in self._optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    for tensor in (parameter, *part.optimizer.state.get(parameter, {}).values()):
                        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                            continue
                        storage = tensor.untyped_storage()
                        if storage.nbytes() and storage.data_ptr() not in seen:
                            seen.add(storage.data_ptr())
                            yield storage


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

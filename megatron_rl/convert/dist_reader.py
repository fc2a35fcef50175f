"""Reads tensors of a `torch_dist` checkpoint by region, in one process and without megatron-core.

torch's own reader does the work. The index (`.metadata`) is read with an allow-list, and tensors with `weights_only`.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rl.errors import CheckpointError, first_line
from megatron_rl.weights.dist_index import Unreadable, read_metadata
from megatron_rl.weights.safetensors_header import TensorInfo


class DistReader:
    """The tensors of a checkpoint.

    Attributes:
        tensors: key -> shape of the whole tensor and dtype, and the folder for messages.
        objects: keys of the entries that are no tensors.
        files: number of shard files.

    Raises:
        CheckpointError: the index is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._metadata, _ = read_metadata(path / ".metadata")
        except Unreadable as error:
            raise CheckpointError(f"{path}: {error}; fetch the checkpoint again") from error
        found = self._metadata.state_dict_metadata
        tensors = {key: entry for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        self.tensors = {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype, path) for key, entry in tensors.items()
        }
        self.objects = [key for key in found if key not in tensors]
        self.files = len({place.relative_path for place in self._metadata.storage_data.values()})
        self._reader = FileSystemReader(str(path))
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, key: str, index: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a region of a tensor, in the stored dtype.

        Args:
            key: name of the tensor.
            index: numbers in the leading dimensions.
            shape: shape of the region behind them, from the first element on.

        Raises:
            CheckpointError: a file is missing or damaged, or does not hold the region.
        """
        leading = len(index)
        size = torch.Size((1,) * leading + tuple(shape))
        offset = torch.Size((*index, *(0 for _ in shape)))
        entry: Any = self._metadata.state_dict_metadata[key]
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offset, size)])
        if sum(prod(item.lengths) for item in items) != prod(size):
            raise CheckpointError(f"the shards of {self.path} do not cover tensor '{key}': the copy is incomplete")
        target = torch.empty(size, dtype=self.tensors[key].dtype)
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        # Damage shows as nearly any error of the unpickler, the zip reader or the file system.
        except Exception as error:
            raise CheckpointError(f"tensor '{key}' of {self.path} cannot be read: {first_line(error)}") from error
        return target.reshape(tuple(shape))


class _Into(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        return None

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None

"""The forms in which folders store the tensors of a name table: plain, stacked over experts, or as block-FP8 codes.

Each form reads one tensor of the table by slices, without reading what the slice does not need.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.errors import CheckpointError
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.safetensors_header import TensorInfo


class StoredForm(ABC):
    """One tensor of the name table as a folder stores it."""

    @property
    @abstractmethod
    def info(self) -> TensorInfo:
        """Shape and dtype of the tensor that `read` returns slices of, and the file that holds it."""

    @property
    @abstractmethod
    def stored(self) -> tuple[str, ...]:
        """Names of the stored tensors that are read."""

    @abstractmethod
    def read(self, start: int, stop: int, dim: int = 0) -> Tensor:
        """Return `tensor.narrow(dim, start, stop - start)`."""


@dataclass(frozen=True)
class PlainTensor(StoredForm):
    """The tensor itself, under this or another name."""

    folder: HFFolder
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.folder.tensors[self.name]

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, start: int, stop: int, dim: int = 0) -> Tensor:
        return self.folder.read_rows(self.name, start, stop, dim)


@dataclass(frozen=True)
class StackedPart(StoredForm):
    """Rows of one expert in a tensor that holds all experts of a layer, shape [experts, rows, columns].

    transformers 5 keeps experts so, and writes them so if asked to.

    Attributes:
        folder: the folder.
        name: name of the stacked tensor.
        expert: number of the expert.
        first: first of the expert's rows that belong to the tensor.
        rows: number of these rows.
    """

    folder: HFFolder
    name: str
    expert: int
    first: int
    rows: int

    @property
    def info(self) -> TensorInfo:
        whole = self.folder.tensors[self.name]
        return TensorInfo((self.rows, *whole.shape[2:]), whole.dtype, whole.file)

    @property
    def stored(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, start: int, stop: int, dim: int = 0) -> Tensor:
        rows = slice(self.first + start, self.first + stop) if dim == 0 else slice(self.first, self.first + self.rows)
        columns = slice(None) if dim == 0 else slice(start, stop)
        return self.folder.read_at(self.name, (self.expert, rows, columns))


@dataclass(frozen=True)
class BlockFP8(StoredForm):
    """A matrix of FP8 codes with one fp32 scale per tile. Slices are dequantized: code times scale, in fp32.

    Attributes:
        folder: the folder.
        name: name of the codes.
        scales: name of the scales.
        tile: rows and columns of a tile.
    """

    folder: HFFolder
    name: str
    scales: str
    tile: tuple[int, int]

    @property
    def info(self) -> TensorInfo:
        codes = self.folder.tensors[self.name]
        return TensorInfo(codes.shape, torch.bfloat16, codes.file)

    @property
    def stored(self) -> tuple[str, ...]:
        return self.name, self.scales

    def read(self, start: int, stop: int, dim: int = 0) -> Tensor:
        codes = self.folder.read_rows(self.name, start, stop, dim)
        if bool(((codes.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise CheckpointError(f"tensor '{self.name}' in {self.info.file} has codes that are NaN: fetch it again")
        return codes.to(torch.float32) * self._scale(start, stop, dim)

    def _scale(self, start: int, stop: int, dim: int) -> Tensor:
        """Return the scale of each element of a slice, or one scale for all."""
        stored = self.folder.tensors[self.scales]
        if not stored.shape:
            return self._checked(self.folder.read(self.scales))
        high = self.tile[dim]
        first = start // high
        scales = self._checked(self.folder.read_rows(self.scales, first, -(-stop // high), dim))
        for axis, length in enumerate(self.tile):
            scales = scales.repeat_interleave(length, axis)
        other = 1 - dim
        return scales.narrow(dim, start - first * high, stop - start).narrow(other, 0, self.info.shape[other])

    def _checked(self, scales: Tensor) -> Tensor:
        scales = scales.to(torch.float32)
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise CheckpointError(
                f"tensor '{self.scales}' has scales that are not finite or not above 0: fetch it again"
            )
        return scales

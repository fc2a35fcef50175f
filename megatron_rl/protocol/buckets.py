"""Buckets: flat pieces of bounded size into which an export stream is packed for a weight update."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One tensor of a bucket: its bytes are `data[start : start + nbytes]`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Bucket:
    """Whole tensors one after another in flat memory, without gaps, each aligned to its element size.

    Attributes:
        index: number of the bucket in its update, from 0.
        pieces: where each tensor is.
        data: uint8, flat. Its memory is reused for the next bucket but one.
        last: whether this is the last bucket of its update.
    """

    index: int
    pieces: tuple[TensorSlot, ...]
    data: Tensor
    last: bool

    def __str__(self) -> str:
        first, last = self.pieces[0].name, self.pieces[-1].name
        return (
            f"bucket {self.index} ('{first}')"
            if len(self.pieces) == 1
            else f"bucket {self.index} ('{first}' to '{last}')"
        )

    @property
    def names(self) -> list[str]:
        return [piece.name for piece in self.pieces]

    @property
    def dtypes(self) -> list[str]:
        return [str(piece.dtype).removeprefix("torch.") for piece in self.pieces]

    @property
    def shapes(self) -> list[list[int]]:
        return [list(piece.shape) for piece in self.pieces]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator over (name, tensor). The tensors are views of `data`."""
        return views(self.data, self.pieces)


def bucket_layout(
    names: Sequence[str], dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]
) -> tuple[tuple[TensorSlot, ...], int]:
    """Return where each tensor is in a bucket, and the size of the bucket in bytes.

    Args:
        names: names of the tensors, in order.
        dtypes: their dtypes.
        shapes: their shapes.

    Raises:
        ValueError: if a tensor is not aligned to its element size.
    """
    pieces, start = [], 0
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        piece = TensorSlot(name, dtype, tuple(shape), start)
        if start % dtype.itemsize:
            raise ValueError(f"tensor '{name}' of {dtype} would begin at byte {start}")
        pieces.append(piece)
        start += piece.nbytes
    return tuple(pieces), start


def views(data: Tensor, pieces: Iterable[TensorSlot]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each piece, as views of the bucket's uint8 memory `data`."""
    for piece in pieces:
        yield piece.name, data[piece.start : piece.start + piece.nbytes].view(piece.dtype).view(piece.shape)


class Buckets:
    """Two buffers that are filled in turn, so that one can be sent while the next one is filled.

    Args:
        nbytes: size of both buffers together. A buffer grows to the size of a tensor that does not fit into it.
        make: allocates uint8 memory of a given number of bytes on the tensors' device, in the kind of memory that the
            transport needs.
    """

    def __init__(self, nbytes: int, make: Callable[[int, torch.device], Tensor]) -> None:
        self._nbytes, self._make = max(1, nbytes // 2), make
        self._buffers: list[Tensor | None] = [None, None]

    def fill(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
        """Yield one bucket after another.

        When the next bucket is requested, the last but one must no longer be in use.
        """
        pieces: list[TensorSlot] = []
        filled = index = 0
        for name, tensor in stream:
            if pieces and (filled + tensor.nbytes > self._nbytes or filled % tensor.dtype.itemsize):
                yield self._bucket(index, pieces, filled, last=False)
                pieces, filled, index = [], 0, index + 1
            piece = TensorSlot(name, tensor.dtype, tuple(tensor.shape), filled)
            buffer = self._room(index, filled + piece.nbytes, tensor.device)
            buffer[filled : filled + piece.nbytes].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
            pieces.append(piece)
            filled += piece.nbytes
        if pieces:
            yield self._bucket(index, pieces, filled, last=True)

    @property
    def on_gpu(self) -> bool:
        """Whether a buffer is in the memory of a GPU."""
        return any(buffer is not None and buffer.is_cuda for buffer in self._buffers)

    def free(self) -> None:
        """Release the buffers."""
        self._buffers = [None, None]

    def _room(self, index: int, nbytes: int, device: torch.device) -> Tensor:
        buffer = self._buffers[index % 2]
        if buffer is None or buffer.numel() < nbytes:
            self._buffers[index % 2] = buffer = None  # release it before the larger one is allocated
            self._buffers[index % 2] = buffer = self._make(max(nbytes, self._nbytes), device)
        return buffer

    def _bucket(self, index: int, pieces: list[TensorSlot], filled: int, *, last: bool) -> Bucket:
        buffer = self._buffers[index % 2]
        assert buffer is not None
        return Bucket(index, tuple(pieces), buffer[:filled], last)

"""The export stream in flat pieces of bounded size, which is what travels in a weight update."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
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
    """Whole tensors one behind the other, without gaps, each aligned to its element. data: uint8, flat.

    last: of its update. The memory of `data` is used again for the next bucket but one.
    """

    index: int
    pieces: tuple[Piece, ...]
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
        """Views of `data`."""
        return views(self.data, self.pieces)


def layout(
    names: Sequence[str], dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]
) -> tuple[tuple[Piece, ...], int]:
    """Where each tensor lies in a bucket, and the bucket's bytes. ValueError when one is not aligned to its element."""
    pieces, start = [], 0
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        piece = Piece(name, dtype, tuple(shape), start)
        if start % dtype.itemsize:
            raise ValueError(f"tensor '{name}' of {dtype} would begin at byte {start}")
        pieces.append(piece)
        start += piece.nbytes
    return tuple(pieces), start


def views(data: Tensor, pieces: Iterable[Piece]) -> Iterator[tuple[str, Tensor]]:
    for piece in pieces:
        yield piece.name, data[piece.start : piece.start + piece.nbytes].view(piece.dtype).view(piece.shape)


class Buckets:
    """Fills two buffers in turn, so that one can travel while the next is filled.

    nbytes: of both together; a tensor larger than one makes it grow to its size. make: allocates uint8 memory of so many
    bytes, where the tensors are and in the kind of memory the transport needs.
    """

    def __init__(self, nbytes: int, make: Callable[[int, torch.device], Tensor]) -> None:
        self._nbytes, self._make = max(1, nbytes // 2), make
        self._buffers: list[Tensor | None] = [None, None]

    def fill(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
        """Bucket after bucket; when one is asked for, the last but one must be done with."""
        pieces: list[Piece] = []
        filled = index = 0
        for name, tensor in stream:
            if pieces and (filled + tensor.nbytes > self._nbytes or filled % tensor.dtype.itemsize):
                yield self._bucket(index, pieces, filled, last=False)
                pieces, filled, index = [], 0, index + 1
            piece = Piece(name, tensor.dtype, tuple(tensor.shape), filled)
            buffer = self._room(index, filled + piece.nbytes, tensor.device)
            buffer[filled : filled + piece.nbytes].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
            pieces.append(piece)
            filled += piece.nbytes
        if pieces:
            yield self._bucket(index, pieces, filled, last=True)

    def free(self) -> None:
        """Give the buffers back."""
        self._buffers = [None, None]

    def _room(self, index: int, nbytes: int, device: torch.device) -> Tensor:
        buffer = self._buffers[index % 2]
        if buffer is None or buffer.numel() < nbytes:
            self._buffers[index % 2] = buffer = None  # before the larger one is made
            self._buffers[index % 2] = buffer = self._make(max(nbytes, self._nbytes), device)
        return buffer

    def _bucket(self, index: int, pieces: list[Piece], filled: int, *, last: bool) -> Bucket:
        buffer = self._buffers[index % 2]
        assert buffer is not None
        return Bucket(index, tuple(pieces), buffer[:filled], last)

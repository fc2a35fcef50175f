"""A left-padded key-value cache that grows in chunks, removes rows and joins another cache.

All rows end at the same column. A shorter row has unused columns on its left, which the attention mask hides.
"""

from typing import Self

import torch
from transformers.cache_utils import Cache, DynamicLayer

CHUNK = 64  # most spare columns


class GrowingLayer(DynamicLayer):
    """Keys and values [rows, heads, columns, head_dim] in a buffer with spare columns.

    transformers' own dynamic layer copies the whole cache at every token; this one at every 64th token, and more often
    while it is short. Columns in use are written before they are read, so the spare ones hold anything.
    """

    length = 0
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if self._buffers is None:
            self._buffers = (_spare(key_states, end), _spare(value_states, end))
        elif end > self._buffers[0].shape[-2]:
            self._buffers = (_moved(self._buffers[0], end), _moved(self._buffers[1], end))
        keys, values = self._buffers
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        self._expose(end)
        return self.keys, self.values

    def fill(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Take over buffers whose first `length` columns are in use.

        Args:
            keys: buffer [rows, heads, columns, head_dim].
            values: buffer of the same shape.
            length: number of columns in use.
        """
        self.lazy_initialization(keys, values)
        self._buffers = (keys, values)
        self._expose(length)

    def get_seq_length(self) -> int:
        return self.length

    def _expose(self, length: int) -> None:
        assert self._buffers is not None
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


class GrowingCache(Cache):
    """The `past_key_values` of a transformers model: one GrowingLayer per attention layer."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    @property
    def length(self) -> int:
        """Columns in use, padding included."""
        return self.layers[0].length if self.layers else 0

    def select(self, rows: torch.Tensor, drop_left: int = 0) -> Self:
        """Return the given rows (int64 indices, repeats allowed) without the `drop_left` leftmost columns."""
        out = type(self)()
        for layer in self.layers:
            new = GrowingLayer()
            keys, values = (old[:, :, drop_left:].index_select(0, rows) for old in (layer.keys, layer.values))
            new.fill(keys, values, keys.shape[-2])
            out.layers.append(new)
        return out

    def join(self, other: Self) -> Self:
        """Return the rows of both caches. The shorter one is padded with zeros on the left."""
        out = type(self)()
        columns = max(self.length, other.length)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            new = GrowingLayer()
            keys, values = _stack(mine.keys, theirs.keys, columns), _stack(mine.values, theirs.values, columns)
            new.fill(keys, values, columns)
            out.layers.append(new)
        return out


def _spare(like: torch.Tensor, columns: int) -> torch.Tensor:
    rows, heads, _, width = like.shape
    return like.new_empty(rows, heads, columns + min(CHUNK, columns), width)


def _moved(buffer: torch.Tensor, columns: int) -> torch.Tensor:
    out = _spare(buffer, columns)
    out[:, :, : buffer.shape[-2]] = buffer
    return out


def _stack(first: torch.Tensor, second: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the rows of both, [rows_a + rows_b, heads, columns + spare, width].

    The padding on the left is zero, because a masked column must hold finite numbers.
    """
    _, heads, _, width = first.shape
    out = first.new_zeros(len(first) + len(second), heads, columns + CHUNK, width)
    out[: len(first), :, columns - first.shape[-2] : columns] = first
    out[len(first) :, :, columns - second.shape[-2] : columns] = second
    return out

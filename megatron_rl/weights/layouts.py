"""Layouts: how one mcore parameter is built from Hugging Face tensors, and how tensor parallelism shards it.

A layout holds the full shapes of its Hugging Face tensors. `read` builds one rank's parameter from only the slices that
this rank needs. `merge` rebuilds the Hugging Face tensors from the parameters of all ranks, bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError
from megatron_rl.weights.hf_folder import Reader

Shape = tuple[int, ...]


def check_divides(units: Mapping[str, int], size: int) -> None:
    """Check that `size` tensor-parallel ranks divide every count in `units` (config.json key -> count).

    Raises:
        ConfigError: if they do not. The message names the nearest size that works.
    """
    bad = {key: count for key, count in units.items() if count % size}
    if not bad:
        return
    common = gcd(*units.values())
    nearest = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: (abs(n - size), n))
    counts = ", ".join(f"{key} = {count}" for key, count in bad.items())
    raise ConfigError(
        f"parallel.tensor = {size} does not divide {counts} of the model; the nearest value that works is {nearest}"
    )


def padded_vocab(vocab_size: int, size: int) -> int:
    """Return the number of rows of the embedding and the output layer under `size` tensor-parallel ranks.

    It is `vocab_size` rounded up to a multiple of `size`.
    """
    return -(-vocab_size // size) * size


class Layout(ABC):
    """One mcore parameter, its Hugging Face tensors, and the tensor-parallel sharding between them."""

    replicated: ClassVar[bool] = False
    """Every tensor-parallel rank holds the whole parameter."""

    @property
    @abstractmethod
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors."""

    @property
    def units(self) -> dict[str, int]:
        """Counts that the tensor-parallel size must divide, by config.json key."""
        return {}

    @abstractmethod
    def local_shape(self, size: int) -> Shape:
        """Return the shape of the parameter on each of `size` ranks."""

    @abstractmethod
    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        """Return the parameter of one rank, contiguous, in the stored dtype.

        Args:
            sources: readers of the Hugging Face tensors, in the order of `shapes`.
            rank: tensor-parallel rank.
            size: number of tensor-parallel ranks.
        """

    @abstractmethod
    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the Hugging Face tensors, contiguous, from the parameters of all ranks in rank order."""

    def check(self, size: int) -> None:
        """Check that `size` ranks can hold this parameter. Raise ConfigError if they cannot."""
        check_divides(self.units, size)


@dataclass(frozen=True)
class Replicated(Layout):
    """The same tensor on every rank (norms)."""

    shape: Shape
    replicated: ClassVar[bool] = True

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def local_shape(self, size: int) -> Shape:
        return self.shape

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        return sources[0](0, self.shape[0])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (shards[0].contiguous(),)


@dataclass(frozen=True)
class RowParallel(Layout):
    """One matrix whose input features (dimension 1) are sharded over ranks.

    Attributes:
        shape: full shape of the matrix.
        key: config.json key of the number of input features.
    """

    shape: Shape
    key: str

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    @property
    def units(self) -> dict[str, int]:
        return {self.key: self.shape[1]}

    def local_shape(self, size: int) -> Shape:
        return (self.shape[0], self.shape[1] // size)

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        part = self.shape[1] // size
        return sources[0](rank * part, (rank + 1) * part, 1).contiguous()

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards), 1),)


@dataclass(frozen=True)
class VocabParallel(Layout):
    """A [vocab_size, hidden_size] matrix sharded by rows, with zero rows at the end up to a multiple of the ranks.

    The zero rows exist only in the trainer: `merge` removes them.
    """

    vocab_size: int
    hidden_size: int

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return ((self.vocab_size, self.hidden_size),)

    def local_shape(self, size: int) -> Shape:
        return (padded_vocab(self.vocab_size, size) // size, self.hidden_size)

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        rows = self.local_shape(size)[0]
        start = min(rank * rows, self.vocab_size)
        stored = sources[0](start, min(start + rows, self.vocab_size))
        if len(stored) == rows:
            return stored
        return torch.cat([stored, stored.new_zeros(rows - len(stored), self.hidden_size)])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards))[: self.vocab_size].contiguous(),)


@dataclass(frozen=True)
class HeadRows(Layout):
    """One tensor whose rows belong to heads, in their order. A rank holds those of an equal share of the heads.

    Attributes:
        heads: number of heads.
        rows: rows of each head.
        inner: the shape after the rows: (columns,) for weights and () for one number per row.
    """

    heads: int
    rows: int
    inner: Shape

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return ((self.heads * self.rows, *self.inner),)

    @property
    def units(self) -> dict[str, int]:
        return {"num_attention_heads": self.heads}

    def local_shape(self, size: int) -> Shape:
        return (self.heads * self.rows // size, *self.inner)

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        part = self.local_shape(size)[0]
        return sources[0](rank * part, (rank + 1) * part)

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards)),)


@dataclass(frozen=True)
class QKV(Layout):
    """q, k and v projections as mcore's linear_qkv: for each key-value group its query heads, then k, then v.

    A rank holds whole groups. If there are more ranks than groups, it holds an equal share of the rows, wherever they
    begin: megatron-core gathers the rows of a group before it uses them.

    Attributes:
        heads: number of query heads.
        groups: number of key-value groups.
        head_dim: width of one head.
        inner: the shape after the output features: (hidden,) for weights and () for biases.
    """

    heads: int
    groups: int
    head_dim: int
    inner: Shape

    @property
    def shapes(self) -> tuple[Shape, ...]:
        q, kv = self.heads * self.head_dim, self.groups * self.head_dim
        return (q, *self.inner), (kv, *self.inner), (kv, *self.inner)

    @property
    def units(self) -> dict[str, int]:
        return {"num_attention_heads": self.heads}

    def check(self, size: int) -> None:
        super().check(size)
        if self.groups % size and size % self.groups:
            raise ConfigError(
                f"parallel.tensor = {size} neither divides num_key_value_heads = {self.groups} of the model, nor is a "
                "multiple of it"
            )
        rows = (self.heads + 2 * self.groups) * self.head_dim
        if rows % size:
            raise ConfigError(f"parallel.tensor = {size} does not divide the {rows} rows of queries, keys and values")

    def local_shape(self, size: int) -> Shape:
        return ((self.heads + 2 * self.groups) * self.head_dim // size, *self.inner)

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        if self.groups % size:
            rows = self.local_shape(size)[0]
            return torch.cat([sources[part](start, stop) for part, start, stop in self.slices(rank * rows, rows)])
        groups = self.groups // size
        parts = []
        for source, shape in zip(sources, self.shapes, strict=True):
            rows = shape[0] // size
            parts.append(source(rank * rows, (rank + 1) * rows).reshape(groups, rows // groups, *self.inner))
        return torch.cat(parts, 1).reshape(self.local_shape(size))

    def slices(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield (part, start, stop) for rows `first` to `first + count` of linear_qkv: part 0 is q, 1 is k, 2 is v."""
        queries = self.heads // self.groups * self.head_dim
        at = 0
        for group in range(self.groups):
            for part, width in enumerate((queries, self.head_dim, self.head_dim)):
                start, stop = max(at, first), min(at + width, first + count)
                if start < stop:
                    yield part, group * width + start - at, group * width + stop - at
                at += width

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        queries = self.heads // self.groups * self.head_dim
        grouped = torch.cat(list(shards)).reshape(self.groups, queries + 2 * self.head_dim, *self.inner)
        parts = grouped.split([queries, self.head_dim, self.head_dim], 1)
        return tuple(part.reshape(shape).contiguous() for part, shape in zip(parts, self.shapes, strict=True))


@dataclass(frozen=True)
class FusedGateUp(Layout):
    """Gate and up projections that are one Hugging Face matrix, gate rows first, as mcore's gated linear_fc1."""

    ffn_hidden_size: int
    hidden_size: int
    key: str = "intermediate_size"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return ((2 * self.ffn_hidden_size, self.hidden_size),)

    @property
    def units(self) -> dict[str, int]:
        return {self.key: self.ffn_hidden_size}

    def local_shape(self, size: int) -> Shape:
        return (2 * self.ffn_hidden_size // size, self.hidden_size)

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        rows = self.ffn_hidden_size // size
        starts = (rank * rows, self.ffn_hidden_size + rank * rows)
        return torch.cat([sources[0](start, start + rows) for start in starts])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return (torch.cat([gate for gate, _ in halves] + [up for _, up in halves]),)


@dataclass(frozen=True)
class WholeLayout(Layout):
    """A layout of experts, which tensor parallelism does not cut. Only its Hugging Face form differs from mcore's."""

    def local_shape(self, size: int) -> Shape:
        assert size == 1, "experts are whole on their rank"
        return self.whole_shape

    @property
    @abstractmethod
    def whole_shape(self) -> Shape:
        """Shape of the parameter."""


@dataclass(frozen=True)
class InterleavedGateUp(WholeLayout):
    """Gate and up projections of one expert whose columns alternate in one transposed tensor, as gpt-oss has them.

    Attributes:
        ffn_hidden_size: width of the expert.
        inner: the shape before the columns: (hidden,) for weights and () for biases.
    """

    ffn_hidden_size: int
    inner: Shape

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return ((*self.inner, 2 * self.ffn_hidden_size),)

    @property
    def whole_shape(self) -> Shape:
        return (2 * self.ffn_hidden_size, *self.inner)

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        rows = sources[0](0, self.shapes[0][0]).movedim(-1, 0)
        return torch.cat([rows[0::2], rows[1::2]])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.stack(shards[0].chunk(2), 1).flatten(0, 1).movedim(0, -1).contiguous(),)


@dataclass(frozen=True)
class Transposed(WholeLayout):
    """One matrix of an expert that Hugging Face stores transposed."""

    shape: Shape

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    @property
    def whole_shape(self) -> Shape:
        return self.shape[::-1]

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        return sources[0](0, self.shape[0]).T.contiguous()

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (shards[0].T.contiguous(),)


@dataclass(frozen=True)
class GateUp(Layout):
    """Gate and up projections as mcore's gated linear_fc1: each rank holds its gate rows, then its up rows."""

    ffn_hidden_size: int
    hidden_size: int
    key: str = "intermediate_size"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return ((self.ffn_hidden_size, self.hidden_size),) * 2

    @property
    def units(self) -> dict[str, int]:
        return {self.key: self.ffn_hidden_size}

    def local_shape(self, size: int) -> Shape:
        return (2 * self.ffn_hidden_size // size, self.hidden_size)

    def read(self, sources: Sequence[Reader], rank: int, size: int) -> Tensor:
        rows = self.ffn_hidden_size // size
        return torch.cat([source(rank * rows, (rank + 1) * rows) for source in sources])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])

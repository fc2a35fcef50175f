"""An update in buckets delivers every byte in bounded memory, for all tensor sizes and dtypes."""

import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.errors import EngineError
from megatron_rl.protocol.buckets import Bucket, Buckets
from megatron_rl.weight_sync.expected_digests import ExpectedDigests
from megatron_rl.weight_sync.transports.transport import BucketTransport
from megatron_rl.weights.digest import tensor_digest, tensor_digests

BUCKET = 1000  # bytes, of both buffers
DTYPES = st.sampled_from([torch.float8_e4m3fn, torch.bfloat16, torch.float32])


class Memory:
    """An allocator that counts the memory of a tensor as long as a reference to it or to a view of it exists."""

    def __init__(self) -> None:
        self.held = self.peak = self.blocks = self.most_blocks = 0

    def make(self, nbytes: int, device: torch.device | None = None) -> Tensor:
        block = np.zeros(nbytes, dtype=np.uint8)
        weakref.finalize(block, self._freed, nbytes)
        self.held, self.blocks = self.held + nbytes, self.blocks + 1
        self.peak, self.most_blocks = max(self.peak, self.held), max(self.most_blocks, self.blocks)
        return torch.from_numpy(block)

    def _freed(self, nbytes: int) -> None:
        self.held, self.blocks = self.held - nbytes, self.blocks - 1


def made(memory: Memory, elements: int, dtype: torch.dtype, seed: int) -> Tensor:
    tensor = memory.make(elements * dtype.itemsize)
    tensor.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return tensor.view(dtype)


def lazily(memory: Memory, sizes: list[tuple[int, torch.dtype]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as an export does: each one on request, with no other reference to it."""
    return ((f"t{at}", made(memory, elements, dtype, at)) for at, (elements, dtype) in enumerate(sizes))


def digests(sizes: list[tuple[int, torch.dtype]]) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in lazily(Memory(), sizes)}


@given(st.lists(st.tuples(st.integers(1, 400), DTYPES), min_size=1, max_size=60))
def test_a_stream_of_any_tensors_is_held_in_two_buffers_and_one_tensor_at_a_time(
    sizes: list[tuple[int, torch.dtype]],
) -> None:
    """A buffer has half of the allowed size, or the size of a tensor that does not fit into that."""
    buffers, sources = Memory(), Memory()
    arrived: dict[str, str] = {}
    for bucket in Buckets(BUCKET, buffers.make).fill(lazily(sources, sizes)):
        arrived |= {name: tensor_digest(tensor) for name, tensor in bucket.tensors()}
    largest = max(elements * dtype.itemsize for elements, dtype in sizes)
    assert buffers.peak <= max(BUCKET, 2 * largest)
    assert sources.most_blocks <= 2  # the copied tensor is released when the next one exists
    assert arrived == digests(sizes)


def test_buffers_are_used_again_and_given_back() -> None:
    buffers = Memory()
    buckets = Buckets(BUCKET, buffers.make)
    for update in range(3):
        assert [b.index for b in buckets.fill(lazily(Memory(), [(100, torch.float32)] * 10))] == list(range(10)), update
    assert buffers.held == buffers.peak == BUCKET
    buckets.free()
    assert buffers.held == 0


def test_a_tensor_that_would_not_begin_at_a_multiple_of_its_element_opens_the_next_bucket() -> None:
    """Scales after codes of 33 bytes would not begin at a multiple of their element.

    The codes that follow can begin anywhere.
    """
    sizes = [(33, torch.float8_e4m3fn), (1, torch.float32), (33, torch.float8_e4m3fn), (2, torch.bfloat16)]
    found = [bucket.names for bucket in Buckets(BUCKET, Memory().make).fill(lazily(Memory(), sizes))]
    assert found == [["t0"], ["t1", "t2"], ["t3"]]


class Slow(BucketTransport):
    """A transport whose engines read a bucket only after the next one could have been filled."""

    def __init__(self, buffers: Memory) -> None:
        super().__init__(BUCKET)
        self.counted = buffers
        self.arrived: dict[str, str] = {}
        self.versions: list[int | None] = []

    def memory(self, nbytes: int, device: torch.device) -> Tensor:
        return self.counted.make(nbytes)

    def send(
        self, engines: Any, ranks: Mapping[str, int], bucket: Bucket, version: int | None
    ) -> dict[str, EngineError]:
        time.sleep(0.02)
        self.arrived |= {name: tensor_digest(tensor) for name, tensor in bucket.tensors()}
        self.versions.append(version)
        return {}

    def discard(self, engines: Any, urls: Any) -> None:
        """There is nothing to discard."""

    def close(self, engines: Any) -> None:
        """There is nothing to close."""


class Obliging:
    """An engine that begins and ends updates on request."""

    def begin_update(self, url: str) -> None: ...

    def end_update(self, url: str) -> None: ...


def test_an_update_holds_one_bucket_while_it_travels_is_digested_and_is_filled() -> None:
    """Tensors have at most half the size of a buffer, so that a bucket holds several."""
    sizes = [(elements, torch.float32) for elements in [60, 1, 25, 40, 17, 62, 3, 3] * 5]
    buffers, sources, tally = Memory(), Memory(), ExpectedDigests(plain=tensor_digests)
    transport = Slow(buffers)
    transport.prepare(lazily(sources, sizes), 7, tally)
    assert transport.deliver(Obliging(), {"engine": 1}) == {}  # type: ignore[arg-type]
    assert transport.arrived == tally.digests == digests(sizes)
    assert transport.versions == [None] * (len(transport.versions) - 1) + [7] and len(transport.versions) > 5
    assert buffers.peak == BUCKET and sources.most_blocks <= 2

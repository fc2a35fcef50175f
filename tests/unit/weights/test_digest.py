"""Digests that are computed where the tensor is tell everything that those of the host tell."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_rl.engines.control import Traits
from megatron_rl.weight_sync.sync import plain_digests
from megatron_rl.weights import digest
from megatron_rl.weights.digest import device_digests, tensor_digests

EMBEDDED = Traits(embedded=True, ranks=1, device="cpu", dtype="float32", quantized=False)
KNOWN = Traits(embedded=False, ranks=1, device="cpu", dtype="float32", quantized=False)
ON_GPU = Traits(embedded=False, ranks=1, device="cuda", dtype="bfloat16", quantized=False)


def splitmix64(count: int) -> np.ndarray:
    """Return the first outputs of the generator with seed 0, as published: 0xE220A8397B1DCDAF comes first."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def sums_of(words: np.ndarray) -> np.ndarray:
    """Compute the two numbers of words of one row at a time, in unsigned arithmetic."""
    width = 1 << 15
    first, second = (splitmix64(2 * width) | np.uint64(1)).reshape(2, width)
    rows = []
    for at in range(0, len(words), width):
        part = words[at : at + width]
        mixed = part * first[: len(part)]
        mixed ^= mixed >> np.uint64(32)
        rows += [mixed.sum(), (mixed * second[: len(part)]).sum()]
    return np.array(rows, dtype=np.uint64) if len(rows) == 2 else sums_of(np.array(rows, dtype=np.uint64))


def test_the_sums_are_those_of_unsigned_arithmetic_however_many_rows_are_summed_at_once(monkeypatch):
    assert int(splitmix64(1)[0]) == 0xE220A8397B1DCDAF
    words = torch.randint(-(2**62), 2**62, (3 * (1 << 15) + 5,), generator=torch.Generator().manual_seed(1)) * 3
    wanted = sums_of(words.numpy().view(np.uint64)).view(np.int64).tolist()
    for rows in (1, 2, 128):
        monkeypatch.setitem(digest._ROWS_AT_ONCE, "cpu", rows)
        assert digest._sums(words).tolist() == wanted


def test_a_digest_of_the_device_tells_dtype_shape_order_and_every_bit():
    plain = torch.randn(70, 1001, generator=torch.Generator().manual_seed(2)).bfloat16()
    others = [plain.clone() for _ in range(34)]
    flat = [other.view(torch.int16).view(-1) for other in others]
    for bit in range(16):
        flat[2 * bit][12345] ^= 1 << bit if bit < 15 else -(1 << 15)
        flat[2 * bit + 1][-1] ^= 1 << bit if bit < 15 else -(1 << 15)
    flat[32][[0, 1]] = flat[32][[1, 0]]
    flat[33][-2:] = flat[33][-2:].flip(0)
    changed = [*others, plain.view(1001, 70), plain.view(torch.int16), plain[:-1], plain.neg()]
    zeros = [torch.zeros(n, dtype=torch.uint8) for n in (0, 1, 8)]
    found = device_digests([plain, *changed, *zeros])
    assert len(set(found)) == len(found)
    assert device_digests([plain.clone(), plain.t().contiguous().t()]) == [found[0]] * 2


@pytest.mark.parametrize("offset", [1, 2, 8])
def test_where_a_tensor_lies_in_a_bucket_does_not_matter(offset):
    tensor = torch.randint(0, 255, (4096,), dtype=torch.uint8)
    bucket = torch.cat([torch.ones(offset, dtype=torch.uint8), tensor])
    assert device_digests([bucket[offset:]]) == device_digests([tensor])


def test_the_host_waits_once_for_the_digests_of_a_bucket():
    class Fetches(TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.count += function.__name__ in ("tolist", "item", "cpu", "numpy", "__bool__", "__index__")
            return function(*args, **(kwargs or {}))

    with Fetches() as fetches:
        device_digests(torch.randn(8, 40000).unbind())
    assert fetches.count == 1


def test_weights_leave_the_device_for_digests_only_if_an_engine_reports_digests_of_the_host():
    assert plain_digests([EMBEDDED, ON_GPU]) is tensor_digests
    assert plain_digests([ON_GPU]) is plain_digests([KNOWN, ON_GPU]) is device_digests
    assert plain_digests([KNOWN]) is None

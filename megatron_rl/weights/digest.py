"""Digests of tensors: one of the host, which engines report too, and one that is computed where the tensor is.

The exporter, the files in transit and the embedded engine use `tensor_digest`. `device_digests` are for comparisons of
this process with itself: XXH3 is a chain of steps, which a GPU cannot compute in parallel.
"""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

_WORD = 8  # bytes
_ROW = 1 << 15  # words; a row and its products stay in the cache of a CPU
_ROWS_AT_ONCE = {"cpu": 1, "cuda": 128}
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of splitmix64, as int64


def tensor_digest(tensor: Tensor) -> str:
    """Return the XXH3-128 digest of a tensor's dtype, shape and bytes, as a hex string.

    Bit-identical tensors have equal digests; other tensors have different digests. The digest protects against
    accidents, not against attackers: it is computed during every weight update, where a cryptographic digest would take
    longer than the transfer.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_digests(tensors: Iterable[Tensor]) -> list[str]:
    """Return `tensor_digest` of each tensor."""
    return [tensor_digest(tensor) for tensor in tensors]


def device_digests(tensors: Iterable[Tensor]) -> list[str]:
    """Return digests of the dtypes, shapes and bytes of tensors, computed on their device. One copy fetches them all.

    They have the same purpose as `tensor_digest` and are other numbers. They are equal on every device, because they
    are sums of integers.
    """
    given = list(tensors)
    if not given:
        return []
    sums = torch.stack([_sums(_words(tensor)) for tensor in given]).tolist()
    return [
        xxhash.xxh3_128_hexdigest(f"{tensor.dtype} {tuple(tensor.shape)} {first} {second}".encode())
        for tensor, (first, second) in zip(given, sums, strict=True)
    ]


def _words(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as int64 words, without a copy if they are aligned. Zeros fill the last word."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() % _WORD:
        raw = F.pad(raw, (0, -raw.numel() % _WORD))
    elif raw.storage_offset() % _WORD:
        raw = raw.clone()
    return raw.view(torch.int64)


def _sums(words: Tensor) -> Tensor:
    """Return two int64 numbers that depend on every bit of the words, and on their order.

    Each word is multiplied by an odd number of its column, which loses no bit, and mixed. A row becomes two weighted
    sums modulo 2^64. The sums of all rows are then words themselves.
    """
    words = F.pad(words, (0, max(1, -(-len(words) // _ROW)) * _ROW - len(words)))
    weights = _weights(words.device)
    rows = []
    for part in words.view(-1, _ROW).split(_ROWS_AT_ONCE.get(words.device.type, 1)):
        mixed = part * weights[0]
        mixed ^= (mixed >> 32) & 0xFFFFFFFF
        rows.append(torch.stack([mixed.sum(1), (mixed * weights[1]).sum(1)], 1))
    sums = torch.cat(rows)
    return sums[0] if len(sums) == 1 else _sums(sums.view(-1))


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Return two rows of random odd numbers, int64, made by splitmix64."""
    z = torch.arange(1, 2 * _ROW + 1) * _GOLDEN
    z = (z ^ ((z >> 30) & (1 << 34) - 1)) * _FIRST
    z = (z ^ ((z >> 27) & (1 << 37) - 1)) * _SECOND
    return ((z ^ ((z >> 31) & (1 << 33) - 1)) | 1).view(2, _ROW).to(device)

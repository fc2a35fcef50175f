"""Counter-based noise: standard normals that are a function of where they go, and of nothing else.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter of four 32-bit
words and a key of two into four uniform words; Box-Muller turns those into four normals. The counter names the
element, the key the draw:

    key      (seed, optimizer step, global layer), mixed
    counter  (column // 4, position in its trajectory, trajectory id low word, high word)

so every rank, layout, packing, micro-batch and recomputation sees the same value, and nothing need be stored. A column is
an index into a hidden state, or a token of the vocabulary where logits are perturbed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

WORD = 0xFFFFFFFF
MULTIPLY = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

_FULL = 0xFFFFFFFFFFFFFFFF
_CHUNK = 1 << 15  # counters worked on at once on CPU: their words stay in the cache
_UNIT = 2.0**-24  # uniforms have 24 bits, which float32 holds exactly: CPU and GPU start from the same numbers

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Key = tuple[int, int]


@dataclass(frozen=True)
class NoiseRows:
    """Which tokens the rows of a hidden state are: positions [t] in their trajectories, ids [t] of those; int64.

    Ids may be any 64-bit integers. Padding may have any id: what it becomes has no influence.
    """

    positions: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> "NoiseRows":
        return NoiseRows(self.positions.to(device), self.ids.to(device))

    def __getitem__(self, rows: slice) -> "NoiseRows":
        return NoiseRows(self.positions[rows], self.ids[rows])


def noise_key(seed: int, step: int, layer: int) -> Key:
    """Two words, distinct for every (step, layer) of one seed; layer < 65536."""
    mixed = (_mix64(seed & _FULL) + (step << 16) + layer) & _FULL
    return mixed & WORD, mixed >> 32


def philox4x32(counter: Words, key: Key) -> Words:
    """Four words of randomness per counter, ten rounds. counter: uint32 arrays that broadcast to one shape.

    What is the same along a row or a column stays that small for two rounds. A product of two words is read as two words
    where it lies (the low one first: little-endian, as all that torch runs on), so that no pass over memory shifts or masks.
    """
    shape = np.broadcast_shapes(*(words.shape for words in counter))
    products = np.empty((4, *shape), dtype=np.uint64)
    own = np.empty((2, *shape), dtype=np.uint32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(ROUNDS):
        # A round reads the products of the one before it, so two pairs take turns.
        room = (None, None, None, None) if turn < 2 else (*products[2 * (turn % 2) :][:2], *own)
        low0, high0 = _product(c0, MULTIPLY[0], room[0])
        low1, high1 = _product(c2, MULTIPLY[1], room[1])
        c0, c2 = np.bitwise_xor(high1, c1, out=room[2]), np.bitwise_xor(high0, c3, out=room[3])
        c0 ^= np.uint32(k0)
        c2 ^= np.uint32(k1)
        c1, c3 = low1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _product(words: np.ndarray, by: int, out: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Low and high words of words * by, as views into `out`."""
    both = np.multiply(words, np.uint64(by), out=out, dtype=np.uint64).view(np.uint32)
    return both[..., ::2], both[..., 1::2]


def normals(rows: NoiseRows, key: Key, width: int, first: int = 0) -> torch.Tensor:
    """[t, width] float32 standard normals of these tokens under that key: columns first to first + width."""
    out = torch.empty(len(rows), width, device=rows.ids.device)
    for at, eps in chunks(rows, key, width, first):
        out[at] = eps
    return out


def chunks(rows: NoiseRows, key: Key, width: int, first: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
    """`normals` in pieces that fit into the cache, made on the CPU: (slice of rows, [rows, width] float32)."""
    ids, positions = rows.ids.cpu().numpy().view(np.uint64), rows.positions.cpu().numpy().astype(np.uint32)
    low, high = (ids & np.uint64(WORD)).astype(np.uint32), (ids >> np.uint64(32)).astype(np.uint32)
    lanes = np.arange(first // 4, -(-(first + width) // 4), dtype=np.uint32)[None]
    skip, step = first % 4, max(1, _CHUNK // lanes.size)
    for start in range(0, len(rows), step):
        at = slice(start, min(start + step, len(rows)))
        words = philox4x32((lanes, positions[at, None], low[at, None], high[at, None]), key)
        yield at, _box_muller(words).flatten(1)[:, skip : skip + width]


def _box_muller(words: Words) -> torch.Tensor:
    """Four words [...] -> [..., 4] float32 normals: two pairs, each from a radius (words 0, 2) and an angle (words 1, 3)."""
    upper = torch.empty(4, *words[0].shape)  # of the 32 bits the upper 24, which float32 holds exactly
    for place, word in zip((0, 2, 1, 3), words, strict=True):
        upper[place] = torch.from_numpy((word >> np.uint32(8)).view(np.int32))
    radius = upper[:2].add_(1).mul_(_UNIT).log_().mul_(-2).sqrt_()  # of a uniform in (0, 1]
    angle = upper[2:].mul_(2 * torch.pi * _UNIT)
    cosine = angle.cos().mul_(radius)
    sine = angle.sin_().mul_(radius)
    pairs = torch.empty(*words[0].shape, 2, dtype=torch.complex64)  # one pass writes both of a pair side by side
    for pair in (0, 1):
        torch.complex(cosine[pair], sine[pair], out=pairs[..., pair])
    return torch.view_as_real(pairs).flatten(-2)


def _mix64(x: int) -> int:
    """The finalizer of SplitMix64: seeds that are neighbors give keys that are not."""
    x = (x + 0x9E3779B97F4A7C15) & _FULL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _FULL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _FULL
    return x ^ (x >> 31)

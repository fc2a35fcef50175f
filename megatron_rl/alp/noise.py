"""Counter-based noise: standard normals that depend only on the element they are added to and on the draw.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter of four 32-bit
words and a key of two words to four uniform words. Box-Muller maps these to four normals. The counter identifies the
element, the key identifies the draw:

    key      (seed, optimizer step, global layer), mixed
    counter  (column // 4, position in its trajectory, trajectory id low word, high word)

Every rank, layout, packing, micro-batch and recomputation therefore computes the same value, and nothing is stored. A
column is an index into a hidden state, or into the vocabulary if logits are perturbed.
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
_CHUNK = 1 << 15  # counters per chunk on CPU, few enough that their words stay in the cache
_UNIT = 2.0**-24  # uniforms have 24 bits, which float32 represents exactly, so CPU and GPU start from equal numbers

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Key = tuple[int, int]


@dataclass(frozen=True)
class NoiseRows:
    """The tokens of the rows of a hidden state.

    Attributes:
        positions: int64 [t], position of each token in its trajectory.
        ids: int64 [t], id of that trajectory, any 64-bit integer. Padding may have any id, as its value has no effect.
    """

    positions: torch.Tensor
    ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "NoiseRows":
        return NoiseRows(self.positions[rows], self.ids[rows])


def noise_key(seed: int, step: int, layer: int) -> Key:
    """Return a key of two words, distinct for every (step, layer) of one seed.

    Args:
        seed: seed of the run.
        step: optimizer step.
        layer: global layer, below 65536.
    """
    mixed = (_mix64(seed & _FULL) + (step << 16) + layer) & _FULL
    return mixed & WORD, mixed >> 32


def philox4x32(counter: Words, key: Key) -> Words:
    """Return four random words per counter, after ten rounds of Philox.

    One round multiplies c0 and c2 by constants. Each product has 64 bits: a high word and a low word. The new c0 is the
    high word of the c2 product, XORed with the old c1 and a key word. The new c2 is the high word of the c0 product,
    XORed with the old c3 and the other key word. The new c1 and c3 are the low words of the c2 and c0 products.

    The arrays are arranged for speed on a CPU:

    - The counter words may have small shapes that broadcast, for example [1, columns] and [rows, 1]. In the first two
      rounds numpy allocates the results, so a word that is constant along a row or a column stays that small. With the
      counters of `normal_chunks`, c0 and c2 have the full shape after these rounds.
    - Later rounds write to memory that is allocated once. c0 and c2 are overwritten in every round, because their old
      values are not needed after the multiplication.
    - c1 and c3 are not copied out of the products. They are views of the low words, and the next round still reads
      them. The next round must therefore not write its products to the same memory. For this reason there are two
      pairs of product buffers: even rounds (from 0) write to the first pair, odd rounds to the second.
    - A 64-bit product is viewed as two 32-bit words (see `_product`), so no pass over memory shifts or masks.

    Args:
        counter: four uint32 arrays that broadcast to one shape.
        key: two 32-bit words.
    """
    shape = np.broadcast_shapes(*(words.shape for words in counter))
    products = np.empty((4, *shape), dtype=np.uint64)
    own = np.empty((2, *shape), dtype=np.uint32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(ROUNDS):
        # Output arrays for two products, c0 and c2. c1 and c3 are views of the products of the previous round, so this
        # round uses the other pair of product buffers. None: numpy allocates an array of the shape that is needed.
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
    """Return the low and high words of words * by as views into `out`.

    The low word comes first in memory, because every machine that torch runs on is little-endian.
    """
    both = np.multiply(words, np.uint64(by), out=out, dtype=np.uint64).view(np.uint32)
    return both[..., ::2], both[..., 1::2]


def normals(rows: NoiseRows, key: Key, width: int, first: int = 0) -> torch.Tensor:
    """Return standard normals, float32 [t, width].

    Args:
        rows: the t tokens.
        key: key of the noise.
        width: number of columns.
        first: first column. The result holds columns first to first + width.
    """
    out = torch.empty(len(rows), width, device=rows.ids.device)
    for at, eps in normal_chunks(rows, key, width, first):
        out[at] = eps
    return out


def normal_chunks(rows: NoiseRows, key: Key, width: int, first: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the result of `normals` in chunks that fit into the cache: (slice of rows, float32 [rows, width]).

    The chunks are computed on the CPU. The arguments are those of `normals`.
    """
    ids, positions = rows.ids.cpu().numpy().view(np.uint64), rows.positions.cpu().numpy().astype(np.uint32)
    low, high = (ids & np.uint64(WORD)).astype(np.uint32), (ids >> np.uint64(32)).astype(np.uint32)
    lanes = np.arange(first // 4, -(-(first + width) // 4), dtype=np.uint32)[None]
    skip, step = first % 4, max(1, _CHUNK // lanes.size)
    for start in range(0, len(rows), step):
        at = slice(start, min(start + step, len(rows)))
        words = philox4x32((lanes, positions[at, None], low[at, None], high[at, None]), key)
        yield at, _box_muller(words).flatten(1)[:, skip : skip + width]


def _box_muller(words: Words) -> torch.Tensor:
    """Return float32 normals [..., 4] from four words [...].

    The normals are two pairs. Each pair comes from a radius (words 0 and 2) and an angle (words 1 and 3).
    """
    upper = torch.empty(4, *words[0].shape)  # the upper 24 of the 32 bits, which float32 represents exactly
    for place, word in zip((0, 2, 1, 3), words, strict=True):
        upper[place] = torch.from_numpy((word >> np.uint32(8)).view(np.int32))
    radius = upper[:2].add_(1).mul_(_UNIT).log_().mul_(-2).sqrt_()  # the uniform number lies in (0, 1]
    angle = upper[2:].mul_(2 * torch.pi * _UNIT)
    cosine = angle.cos().mul_(radius)
    sine = angle.sin_().mul_(radius)
    # A complex number holds both normals of a pair, so that one pass writes them next to each other.
    pairs = torch.empty(*words[0].shape, 2, dtype=torch.complex64)
    for pair in (0, 1):
        torch.complex(cosine[pair], sine[pair], out=pairs[..., pair])
    return torch.view_as_real(pairs).flatten(-2)


def _mix64(x: int) -> int:
    """Return x mixed by the finalizer of SplitMix64, so that neighboring seeds give unrelated keys."""
    x = (x + 0x9E3779B97F4A7C15) & _FULL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _FULL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _FULL
    return x ^ (x >> 31)

"""Counter-based noise: standard normals that are a function of where they go, and of nothing else.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter of four 32-bit
words and a key of two into four uniform words; Box-Muller turns those into four normals. The counter names the
element, the key the draw:

    key      (seed, optimizer step, global layer), mixed
    counter  (hidden index // 4, position in its trajectory, trajectory id low word, high word)

so every rank, layout, packing, micro-batch and recomputation sees the same value, and nothing need be stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

WORD = 0xFFFFFFFF
MULTIPLY = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

_FULL = 0xFFFFFFFFFFFFFFFF
_CHUNK = 1 << 15  # counters worked on at once on CPU: their words stay in the cache
_UNIT = 2.0**-24  # uniforms have 24 bits, which float32 holds exactly: CPU and GPU start from the same numbers

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
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
    """Four words of randomness per counter, ten rounds. counter: int64 tensors that hold 32-bit words and broadcast.

    What is the same along a row or a column stays that small for as long as it can.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(ROUNDS):
        # A product of two words may pass 2^63; its bits are right all the same, so mask after shifting. The low
        # words keep their upper bits for now: the next round only XORs them, and masks what comes of it.
        wide0, wide1 = c0 * MULTIPLY[0], c2 * MULTIPLY[1]
        high0, high1 = wide0 >> 32, wide1 >> 32
        if turn < 2:
            c0, c2 = (high1 ^ (c1 ^ k0)) & WORD, (high0 ^ (c3 ^ k1)) & WORD
        else:  # by now the words are as large as they will be
            c0 = high1.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
            c2 = high0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = wide1, wide0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def normals(rows: NoiseRows, key: Key, hidden: int) -> torch.Tensor:
    """[t, hidden] float32 standard normals of these tokens under that key; hidden a multiple of 4."""
    out = torch.empty(len(rows), hidden, device=rows.ids.device)
    for at, eps in chunks(rows, key, hidden):
        out[at] = eps
    return out


def chunks(rows: NoiseRows, key: Key, hidden: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """`normals` in pieces that fit into the cache: (slice of rows, [rows, hidden] float32)."""
    lanes = torch.arange(hidden // 4, device=rows.ids.device)[None]
    step = max(1, _CHUNK // lanes.numel())
    for start in range(0, len(rows), step):
        at = slice(start, min(start + step, len(rows)))
        ids = rows.ids[at, None]
        words = philox4x32((lanes, rows.positions[at, None], ids & WORD, (ids >> 32) & WORD), key)
        yield at, _box_muller(words).flatten(1)


def _box_muller(words: Words) -> torch.Tensor:
    """Four words [...] -> [..., 4] float32 normals: two pairs, each from a radius and an angle."""
    out = torch.empty(*words[0].shape, 4, device=words[0].device)
    for pair in (0, 2):
        radius = (words[pair] >> 8).add_(1).float().mul_(_UNIT).log_().mul_(-2).sqrt_()  # of a uniform in (0, 1]
        angle = (words[pair + 1] >> 8).float().mul_(_UNIT).mul_(2 * torch.pi)
        torch.mul(angle.cos(), radius, out=out[..., pair])
        torch.mul(angle.sin_(), radius, out=out[..., pair + 1])
    return out


def _mix64(x: int) -> int:
    """The finaliser of SplitMix64: seeds that are neighbours give keys that are not."""
    x = (x + 0x9E3779B97F4A7C15) & _FULL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _FULL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _FULL
    return x ^ (x >> 31)

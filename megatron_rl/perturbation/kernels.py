"""The noise on a GPU: one pass adds it, one sums a gradient against it, and it never reaches memory.

The integers are those of `noise.philox4x32`; the normals made of them differ by rounding only. Needs triton.
"""

import torch
import triton
import triton.language as tl

from megatron_rl.perturbation.noise import WORD, Key, NoiseRows

_BLOCK = 512  # counters per program: four elements each


def add_noise(hidden: torch.Tensor, sigma: torch.Tensor, rows: NoiseRows, key: Key) -> torch.Tensor:
    """hidden [t, H] (float32, bfloat16, float16) + sigma [1] * eps, added in float32 and rounded once."""
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    _launch(_add_noise, hidden, rows, key, sigma, out)
    return out


def dot_noise(grad: torch.Tensor, rows: NoiseRows, key: Key) -> torch.Tensor:
    """[1] float64: the sum of grad [t, H] * eps; sums of 2048 products in float32, those in float64, in a fixed order."""
    grad = grad.contiguous()
    parts = torch.empty(triton.cdiv(grad.numel() // 4, _BLOCK), dtype=torch.float32, device=grad.device)
    _launch(_dot_noise, grad, rows, key, parts)
    return parts.sum(0, keepdim=True, dtype=torch.float64)


def _launch(kernel: triton.JITFunction, x: torch.Tensor, rows: NoiseRows, key: Key, *others: torch.Tensor) -> None:
    hidden, counters = x.shape[1], x.numel() // 4
    if hidden % 4:
        raise ValueError(f"the hidden size is {hidden}; it must be a multiple of 4")
    grid = (triton.cdiv(counters, _BLOCK),)
    kernel[grid](x, rows.positions, rows.ids, *others, *map(_signed, key), counters, hidden // 4, BLOCK=_BLOCK)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits: whatever the key, the kernel is compiled for one type."""
    return word - WORD - 1 if word > WORD >> 1 else word


@triton.jit
def _uniforms(words):
    return (words >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _normals(positions, ids, k0, k1, counters, lanes, BLOCK: tl.constexpr):
    """[4 * BLOCK] normals of this program's counters, in the order of memory, and their places and which exist."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    n = first + tl.arange(0, BLOCK)
    row = n // lanes
    real = n < counters
    position = tl.load(positions + row, mask=real, other=0).to(tl.uint32)
    token = tl.load(ids + row, mask=real, other=0)
    low, high = (token & 0xFFFFFFFF).to(tl.uint32), ((token >> 32) & 0xFFFFFFFF).to(tl.uint32)
    lane = (n - row * lanes).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(lane, position, low, high, k0.to(tl.uint32), k1.to(tl.uint32), 10)
    radius0 = tl.sqrt_rn(-2 * tl.log(_uniforms(w0) + 5.9604644775390625e-08))
    radius1 = tl.sqrt_rn(-2 * tl.log(_uniforms(w2) + 5.9604644775390625e-08))
    angle0, angle1 = _uniforms(w1) * 6.283185307179586, _uniforms(w3) * 6.283185307179586
    cosines = tl.interleave(tl.cos(angle0) * radius0, tl.cos(angle1) * radius1)
    sines = tl.interleave(tl.sin(angle0) * radius0, tl.sin(angle1) * radius1)
    places = 4 * first + tl.arange(0, 4 * BLOCK)
    return tl.interleave(cosines, sines), places, places < 4 * counters


@triton.jit(do_not_specialize=["k0", "k1"])
def _add_noise(hidden, positions, ids, sigma, out, k0, k1, counters, lanes, BLOCK: tl.constexpr):
    eps, places, real = _normals(positions, ids, k0, k1, counters, lanes, BLOCK)
    h = tl.load(hidden + places, mask=real, other=0.0).to(tl.float32)
    tl.store(out + places, (h + tl.load(sigma) * eps).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["k0", "k1"])
def _dot_noise(grad, positions, ids, parts, k0, k1, counters, lanes, BLOCK: tl.constexpr):
    eps, places, real = _normals(positions, ids, k0, k1, counters, lanes, BLOCK)
    g = tl.load(grad + places, mask=real, other=0.0).to(tl.float32)
    tl.store(parts + tl.program_id(0), tl.sum(g * eps, axis=0))

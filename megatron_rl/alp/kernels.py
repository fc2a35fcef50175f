"""GPU kernels for the noise. Needs triton.

One kernel adds the noise, one computes the dot product of a gradient and the noise. The noise is never written to
memory. The integers are those of `noise.philox4x32`. The normals computed from them differ by rounding only.
"""

import torch
import triton
import triton.language as tl

from megatron_rl.alp.noise import WORD, Key, NoiseRows

_BLOCK = 512  # maximum number of counters per program; every counter gives four elements


def launch_add_noise(
    x: torch.Tensor, sigma: torch.Tensor, rows: NoiseRows, key: Key, first: int = 0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x + sigma * eps, added in float32 and rounded once.

    Args:
        x: [t, n], float32, bfloat16 or float16.
        sigma: [1].
        rows: the tokens of the rows of x.
        key: key of the noise.
        first: global index of column 0 of x. eps is the noise of columns first to first + n.
        out: contiguous tensor for the result, may be x itself. None for a new tensor.
    """
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    grid, block = _grid(x, first)
    _add_noise[grid](x, rows.positions, rows.ids, sigma, out, *map(_signed, key), first, x.shape[1], BLOCK=block)
    return out


def launch_dot_noise(grad: torch.Tensor, rows: NoiseRows, key: Key, first: int = 0) -> torch.Tensor:
    """Return the sum of grad * eps, float64 [1].

    Up to 2048 products are summed in float32, the partial sums in float64. The order is fixed.

    Args:
        grad: [t, n].
        rows: the tokens of the rows of grad.
        key: key of the noise.
        first: global index of column 0 of grad.
    """
    grad = grad.contiguous()
    grid, block = _grid(grad, first)
    parts = torch.empty(grid, dtype=torch.float32, device=grad.device)
    _dot_noise[grid](grad, rows.positions, rows.ids, parts, *map(_signed, key), first, grad.shape[1], BLOCK=block)
    return parts.sum(dtype=torch.float64)[None]


def _grid(x: torch.Tensor, first: int) -> tuple[tuple[int, int], int]:
    """Return the grid and the block size. A program handles part of one row, so it loads the id of one token only."""
    rows, width = x.shape
    lanes = triton.cdiv(first + width, 4) - first // 4
    block = min(_BLOCK, triton.next_power_of_2(lanes))
    return (rows, triton.cdiv(lanes, block)), block


def _signed(word: int) -> int:
    """Return a 32-bit word as the int32 with the same bits, so that the kernel is compiled for one type only."""
    return word - WORD - 1 if word > WORD >> 1 else word


@triton.jit
def _sine_and_cosine(word):
    """Return sine and cosine of the angle 2 pi * (upper 24 bits as a fraction), the same float32 angle as on a CPU.

    The nearest multiple of pi / 2 is subtracted in three parts, so that no digit is lost. The remainder is at most
    pi / 4. There the polynomials of the Cephes library are accurate to one unit in the last place. Unlike sin and cos,
    this has no slow path.
    """
    fraction = word >> 8
    quarters = (fraction + (1 << 21)) >> 22
    angle = fraction.to(tl.float32) * 5.9604644775390625e-08 * 6.283185307179586
    turns = quarters.to(tl.float32)
    x = angle - turns * 1.5703125 - turns * 4.837512969970703e-4 - turns * 7.549789948768648e-8
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = (quarters & 1) == 1
    across, along = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where((quarters & 2) == 2, -across, across), tl.where(((quarters + 1) & 2) == 2, -along, along)


@triton.jit
def _radius(word):
    uniform = ((word >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08  # 2**-24
    return tl.sqrt_rn(-2 * tl.log(uniform))


@triton.jit
def _normals(positions, ids, k0, k1, first, width, BLOCK: tl.constexpr):
    """Return this program's [4 * BLOCK] normals in memory order, their offsets, and a mask of those inside the row."""
    row, start = tl.program_id(0), first // 4 + tl.program_id(1) * BLOCK
    token = tl.load(ids + row)
    position = tl.load(positions + row).to(tl.uint32)
    low, high = (token & 0xFFFFFFFF).to(tl.uint32), ((token >> 32) & 0xFFFFFFFF).to(tl.uint32)
    lane = (start + tl.arange(0, BLOCK)).to(tl.uint32)
    same = tl.zeros_like(lane)
    w0, w1, w2, w3 = tl.philox_impl(
        lane, same + position, same + low, same + high, same + k0.to(tl.uint32), same + k1.to(tl.uint32), 10
    )
    radius0, radius1 = _radius(w0), _radius(w2)
    sine0, cosine0 = _sine_and_cosine(w1)
    sine1, cosine1 = _sine_and_cosine(w3)
    eps = tl.interleave(
        tl.interleave(cosine0 * radius0, cosine1 * radius1), tl.interleave(sine0 * radius0, sine1 * radius1)
    )
    column = 4 * start + tl.arange(0, 4 * BLOCK) - first
    return eps, row.to(tl.int64) * width + column, (column >= 0) & (column < width)


@triton.jit(do_not_specialize=["k0", "k1"])
def _add_noise(hidden, positions, ids, sigma, out, k0, k1, first, width, BLOCK: tl.constexpr):
    eps, places, real = _normals(positions, ids, k0, k1, first, width, BLOCK)
    h = tl.load(hidden + places, mask=real, other=0.0).to(tl.float32)
    tl.store(out + places, (h + tl.load(sigma) * eps).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["k0", "k1"])
def _dot_noise(grad, positions, ids, parts, k0, k1, first, width, BLOCK: tl.constexpr):
    eps, places, real = _normals(positions, ids, k0, k1, first, width, BLOCK)
    g = tl.load(grad + places, mask=real, other=0.0).to(tl.float32)
    tl.store(parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(g * eps, axis=0))

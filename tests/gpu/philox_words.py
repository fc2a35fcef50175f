"""A kernel that returns the random words from which the GPU's noise kernels compute normals. Needs triton."""

import torch
import triton
import triton.language as tl

from megatron_rl.alp.kernels import _signed
from megatron_rl.alp.noise import Key

_BLOCK = 256


def words(counter: torch.Tensor, key: Key) -> torch.Tensor:
    """Return the words, int64 [n, 4], of counters int64 [n, 4], computed as in `kernels._normals`."""
    count = len(counter)
    out = torch.empty(count, 4, dtype=torch.int64, device=counter.device)
    k0, k1 = map(_signed, key)
    _words[(triton.cdiv(count, _BLOCK),)](counter.contiguous(), out, k0, k1, count, BLOCK=_BLOCK)
    return out


@triton.jit(do_not_specialize=["k0", "k1"])
def _words(counter, out, k0, k1, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    c0 = tl.load(counter + 4 * at, mask=real, other=0).to(tl.uint32)
    c1 = tl.load(counter + 4 * at + 1, mask=real, other=0).to(tl.uint32)
    c2 = tl.load(counter + 4 * at + 2, mask=real, other=0).to(tl.uint32)
    c3 = tl.load(counter + 4 * at + 3, mask=real, other=0).to(tl.uint32)
    same = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, c3, same + k0.to(tl.uint32), same + k1.to(tl.uint32), 10)
    tl.store(out + 4 * at, w0.to(tl.int64), mask=real)
    tl.store(out + 4 * at + 1, w1.to(tl.int64), mask=real)
    tl.store(out + 4 * at + 2, w2.to(tl.int64), mask=real)
    tl.store(out + 4 * at + 3, w3.to(tl.int64), mask=real)

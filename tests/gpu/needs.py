"""Helpers of the GPU tests: requirements of the device, and the tolerance of products on tensor cores."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if CUDA else (0, 0)
HAVE_TE = CUDA and importlib.util.find_spec("transformer_engine") is not None
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "fp8_golden.json").read_text())

needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
needs_te = pytest.mark.skipif(not HAVE_TE, reason="needs a CUDA device and transformer-engine")


def needs_capability(major: int, minor: int = 0) -> pytest.MarkDecorator:
    return pytest.mark.skipif((major, minor) > CAPABILITY, reason=f"needs a CUDA device of sm_{major}{minor} or newer")


# torch has products with block scales only on sm_90. Transformer Engine has those with fp32 block scales only there.
only_hopper = pytest.mark.skipif(CAPABILITY[0] != 9, reason="needs a CUDA device of sm_90")


def raw(codes: Tensor) -> Tensor:
    """Return the bytes of codes on the CPU, in their shape, because FP8 tensors cannot be compared directly."""
    return codes.detach().contiguous().view(torch.uint8).cpu()


def unhex(codes: list[str]) -> list[int]:
    return [int(code, 16) for code in codes]


def spread(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0, tile: int = 128) -> Tensor:
    """Return normal numbers whose magnitude differs between tiles by powers of ten, so that a wrong scale shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    sizes = 10.0 ** torch.randint(-3, 4, (-(-rows // tile), -(-columns // tile)), generator=generator)
    return (x * sizes.repeat_interleave(tile, 0)[:rows].repeat_interleave(tile, 1)[:, :columns]).to(dtype)


def assert_as_accumulated(product_MN: Tensor, a_MK: Tensor, b_NK: Tensor) -> None:
    """Assert that product = a @ b.T up to one rounding to bfloat16 and the accumulation of tensor cores.

    The rounding error is 2^-9 of the result. Tensor cores keep about 14 bits of a sum of FP8 products, which is an
    error of 2^-13 of the sum of magnitudes. The test allows twice each.
    """
    a, b = a_MK.double().cpu(), b_NK.double().cpu()
    expected = a @ b.t()
    allowed = 2.0**-8 * expected.abs() + 2.0**-12 * (a.abs() @ b.abs().t())
    excess = (product_MN.double().cpu() - expected).abs() - allowed
    assert bool((excess <= 0).all()), f"{int((excess > 0).sum())} of {excess.numel()} elements are off"


def relative(a: Any, b: Any) -> float:
    """Return the norm of a - b divided by the norm of b."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (a, b))
    return float((a - b).norm() / b.norm())

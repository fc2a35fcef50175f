"""What tests on a GPU have in common: what they need, and how close a product on tensor cores has to be."""

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
needs_te = pytest.mark.skipif(not HAVE_TE, reason="needs a CUDA device and transformer-engine")


def needs_capability(major: int, minor: int = 0) -> pytest.MarkDecorator:
    return pytest.mark.skipif((major, minor) > CAPABILITY, reason=f"needs a CUDA device of sm_{major}{minor} or newer")


# torch has products of block scales there alone, and Transformer Engine those of fp32 block scales.
only_hopper = pytest.mark.skipif(CAPABILITY[0] != 9, reason="needs a CUDA device of sm_90")


def raw(codes: Tensor) -> Tensor:
    """The bytes of codes on the CPU, in their shape: FP8 tensors cannot be compared themselves."""
    return codes.detach().contiguous().view(torch.uint8).cpu()


def unhex(codes: list[str]) -> list[int]:
    return [int(code, 16) for code in codes]


def spread(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0, tile: int = 128) -> Tensor:
    """Normal numbers whose size differs from tile to tile by powers of ten, so that a wrong scale cannot go unseen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    sizes = 10.0 ** torch.randint(-3, 4, (-(-rows // tile), -(-columns // tile)), generator=generator)
    return (x * sizes.repeat_interleave(tile, 0)[:rows].repeat_interleave(tile, 1)[:, :columns]).to(dtype)


def assert_as_accumulated(product_MN: Tensor, a_MK: Tensor, b_NK: Tensor) -> None:
    """product = a @ b.T up to one rounding to bfloat16 (2^-9 of the result) and the accumulation of tensor cores.

    These keep about 14 bits of a sum of FP8 products: 2^-13 of the sum of magnitudes; twice each is allowed.
    """
    a, b = a_MK.double().cpu(), b_NK.double().cpu()
    expected = a @ b.t()
    allowed = 2.0**-8 * expected.abs() + 2.0**-12 * (a.abs() @ b.abs().t())
    excess = (product_MN.double().cpu() - expected).abs() - allowed
    assert bool((excess <= 0).all()), f"{int((excess > 0).sum())} of {excess.numel()} elements are off"


def relative(a: Any, b: Any) -> float:
    """Norm of a - b over the norm of b."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (a, b))
    return float((a - b).norm() / b.norm())

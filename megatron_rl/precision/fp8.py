"""Values of FP8 codes, read through fp16: several times faster on CPU than torch's own conversion, and bit-equal to it."""

import torch
from torch import Tensor

_NAN = 0x7F  # of E4M3, without its sign


def decode(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """fp32 values of float8_e4m3fn or float8_e5m2 codes, written to `out` (contiguous) if given."""
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if codes.device.type != "cpu":
        return out.copy_(codes)
    if codes.dtype == torch.float8_e5m2:  # the upper byte of an fp16
        return out.copy_((codes.view(torch.int8).to(torch.int16) << 8).view(torch.float16))
    wide = codes.view(torch.int8).to(torch.int16)
    # Sign at bit 15, exponent and mantissa at bits 7 to 13: an fp16 of the value times 2^-8, subnormals included.
    wide <<= 7
    wide &= ~0x4000
    out.copy_(wide.view(torch.float16)).mul_(256.0)
    magnitudes = codes.view(torch.uint8) & _NAN
    if magnitudes.numel() and bool(magnitudes.amax() == _NAN):
        out.masked_fill_(magnitudes == _NAN, torch.nan)
    return out

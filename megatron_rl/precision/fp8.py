"""FP8 codes to fp32 values. On CPU the conversion goes through fp16: bit-equal to torch's and several times faster."""

import torch
from torch import Tensor

_NAN = 0x7F  # NaN of E4M3 without its sign bit


def decode_fp8(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the fp32 values of float8_e4m3fn or float8_e5m2 codes, written to `out` (contiguous) if given."""
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if codes.device.type != "cpu":
        return out.copy_(codes)
    if codes.dtype == torch.float8_e5m2:  # an E5M2 code is the upper byte of an fp16 number
        return out.copy_((codes.view(torch.int8).to(torch.int16) << 8).view(torch.float16))
    wide = codes.view(torch.int8).to(torch.int16)
    # With the sign at bit 15 and exponent and mantissa at bits 7 to 13, the code is the fp16 number value * 2^-8. This
    # includes subnormals.
    wide <<= 7
    wide &= ~0x4000
    out.copy_(wide.view(torch.float16)).mul_(256.0)
    magnitudes = codes.view(torch.uint8) & _NAN
    if magnitudes.numel() and bool(magnitudes.amax() == _NAN):
        out.masked_fill_(magnitudes == _NAN, torch.nan)
    return out

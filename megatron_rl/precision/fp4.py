"""E2M1, the four-bit float: rounding, codes and their packing (torch has neither the cast nor its inverse)."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX = 6.0
_EXPONENT = 0x7F800000
_TO_UNIT = 1.5 * 2.0**22  # times 2^e, added to y of that exponent: leaves one bit of mantissa, rounded to nearest even


def round_(y: Tensor) -> Tensor:
    """fp32 y within [-6, 6] rounded in place to the nearest E2M1 value, ties to even. NaN becomes +6, as in the PTX cast."""
    y.nan_to_num_(nan=MAX)
    # Below 1 the spacing stays .5. The sum and the difference each round once, and only the sum is inexact.
    power = (y.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=1.0)
    rounded = torch.add(y, power, alpha=_TO_UNIT).sub_(power, alpha=_TO_UNIT)
    return y.copy_(rounded.copysign_(y))


def encode(values: Tensor) -> Tensor:
    """Codes 0..15 (uint8) of fp32 values which `round_` gave: sign, two bits of exponent, one of mantissa."""
    # 2^-126 times the value has E2M1's exponent field, and E2M1's subnormal is one of fp32.
    bits = (values * 2.0**-126).view(torch.int32)
    return (((bits >> 28) & 0x8) | ((bits >> 22) & 0x7)).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """fp32 values of codes 0..15."""
    wide = codes.to(torch.int16)
    return (((wide & 0x8) << 12) | ((wide & 0x7) << 9)).view(torch.float16).float().mul_(2.0**14)


def pack(codes_MN: Tensor) -> Tensor:
    """Two codes a byte, the first in the low nibble: uint8 [M, ceil(N / 2)]."""
    if codes_MN.shape[1] % 2:
        codes_MN = F.pad(codes_MN, (0, 1))
    return codes_MN[:, 0::2] | (codes_MN[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack`: uint8 [M, columns]."""
    both = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return both.flatten(1)[:, :columns]

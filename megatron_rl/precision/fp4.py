"""E2M1, the four-bit float: rounding, codes and their packing. torch has neither the cast nor its inverse."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX = 6.0
_EXPONENT = 0x7F800000
# Adding _TO_UNIT * 2^e to a y of exponent e rounds it to one bit of mantissa, to nearest even.
_TO_UNIT = 1.5 * 2.0**22


def round_(y: Tensor) -> Tensor:
    """Round fp32 y in [-6, 6] in place to the nearest E2M1 value, ties to even. NaN becomes +6, as in the PTX cast."""
    y.nan_to_num_(nan=MAX)
    # E2M1 values below 1 are subnormal with a spacing of 0.5, hence the clamp to 1. Only the sum rounds: the difference
    # is exact.
    power = (y.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=1.0)
    rounded = torch.add(y, power, alpha=_TO_UNIT).sub_(power, alpha=_TO_UNIT)
    return y.copy_(rounded.copysign_(y))


def encode_e2m1(values: Tensor) -> Tensor:
    """Return the codes 0..15 (uint8) of fp32 values from `round_`: sign, two exponent bits, one mantissa bit."""
    # After multiplication by 2^-126 the low exponent bits of fp32 are those of E2M1, and the subnormal value of E2M1
    # becomes an fp32 subnormal.
    bits = (values * 2.0**-126).view(torch.int32)
    return (((bits >> 28) & 0x8) | ((bits >> 22) & 0x7)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Return the fp32 values of codes 0..15."""
    wide = codes.to(torch.int16)
    return (((wide & 0x8) << 12) | ((wide & 0x7) << 9)).view(torch.float16).float().mul_(2.0**14)


def pack_nibbles(codes_MN: Tensor) -> Tensor:
    """Pack two codes per byte, the first in the low nibble. Return uint8 [M, ceil(N / 2)]."""
    if codes_MN.shape[1] % 2:
        codes_MN = F.pad(codes_MN, (0, 1))
    return codes_MN[:, 0::2] | (codes_MN[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Return the codes uint8 [M, columns] of packed bytes (inverse of `pack_nibbles`)."""
    both = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return both.flatten(1)[:, :columns]

"""Rows of numbers as one byte each, with one scale a row: what a dispatch sends when its payload is fp8. Plain torch.

A number is stored as e4m3 (4 bits of exponent, 3 of mantissa, largest 448) of itself divided by its row's scale, which
is the row's largest magnitude over 448, rounded up to 8 significant bits. So it comes back with a relative error of at
most 2^-4 and, where it is small, an absolute one of at most 2^-10 scales. Rules for what has no such scale:

* a row of zeros comes back as zeros: a scale is never below 2^-126, the smallest normal number of fp32;
* a row with a NaN or an infinity comes back as NaN in all columns: what has overflowed shows, and no other row sees it;
* nothing else overflows: the largest number of a row becomes 448.

A coded row is ``[H bytes | filling to 4 | the scale, fp32, repeated to a multiple of 16 bytes]``, seen as W columns of
the dtype that the numbers had, so that whatever moves rows of that dtype moves coded ones. They must only be moved:
as numbers they mean nothing. T or R rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNIT = 16


def scale_at(hidden: int) -> int:
    """The byte of a coded row at which its scale begins."""
    return -(-hidden // 4) * 4


def coded_width(hidden: int, dtype: torch.dtype) -> int:
    """W: columns of dtype ``dtype`` of a coded row. Raises ValueError for another dtype than those of tokens."""
    if dtype not in DTYPES:
        raise ValueError(f"an fp8 payload of {dtype}: tokens must be of {', '.join(map(str, DTYPES))}")
    return -(-(scale_at(hidden) + 4) // _UNIT) * _UNIT // dtype.itemsize


def to_e4m3(x_TH: Tensor) -> Tensor:
    """[T, W] coded rows of [T, H], in the dtype of x."""
    rows, hidden = x_TH.shape
    x = x_TH.float()
    top = x.abs().amax(1, keepdim=True)
    scale = (top * (1.0 / LARGEST)).clamp_min(SMALLEST_SCALE)
    scale = ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    scale = torch.where(top.isfinite(), scale, torch.nan)
    coded = x_TH.new_zeros(rows, coded_width(hidden, x_TH.dtype))
    coded.view(torch.uint8)[:, :hidden] = (x / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    coded.view(torch.float32)[:, scale_at(hidden) // 4 :] = scale
    return coded


def from_e4m3(coded_RW: Tensor, hidden: int) -> Tensor:
    """[R, H] numbers, in the dtype of the coded rows, which may be those of a wider buffer."""
    bytes_, begin = coded_RW.view(torch.uint8), scale_at(hidden)
    scale = bytes_[:, begin : begin + 4].contiguous().view(torch.float32)
    return (bytes_[:, :hidden].view(torch.float8_e4m3fn).float() * scale).to(coded_RW.dtype)

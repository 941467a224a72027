"""``e4m3_rows`` as one launch each way: the same bits, by integer arithmetic, so that any GPU can and not Hopper alone.

A program takes one row: it finds the largest magnitude, then codes; the division is rounded to nearest.
Shapes: T or R rows, H hidden, W columns of a coded row.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluid_npu.device.kernels.e4m3_rows import coded_width, scale_at

_BLOCK = 2048


def to_e4m3(x_TH: Tensor) -> Tensor:
    """[T, W] coded rows of [T, H], perhaps rows of a wider buffer."""
    rows, hidden = x_TH.shape
    coded = x_TH.new_empty(rows, coded_width(hidden, x_TH.dtype))
    if rows:
        align, begin = gcd(x_TH.stride(0), 16), scale_at(hidden)
        bytes_ = coded.view(torch.uint8)
        _to[(rows,)](
            x_TH, bytes_, coded.view(torch.float32), hidden, x_TH.stride(0) // align, begin // 4,
            bytes_.shape[1] // 16, ALIGN=align, BLOCK=_block(hidden), num_warps=4,
        )  # fmt: skip
    return coded


def from_e4m3(coded_RW: Tensor, hidden: int) -> Tensor:
    """[R, H] numbers in the dtype of the coded rows, perhaps rows of a wider buffer; contiguous."""
    rows = coded_RW.shape[0]
    x_RH = coded_RW.new_empty(rows, hidden)
    if rows:
        bytes_ = coded_RW.view(torch.uint8)
        _from[(rows,)](
            bytes_, coded_RW.view(torch.float32), x_RH, hidden, scale_at(hidden) // 4,
            bytes_.stride(0) // 16, BLOCK=_block(hidden), num_warps=4,
        )  # fmt: skip
    return x_RH


def _block(hidden: int) -> int:
    return min(triton.next_power_of_2(hidden), _BLOCK)


@triton.jit
def _code(y):
    """The e4m3 bits of fp32 numbers of at most 448, rounded to nearest, ties to even."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # 120 << 3: the exponents' biases are 127 and 7
    # Below 2^-6 the step is 2^-9: adding 2^23 to the number of steps rounds it to a whole one.
    steps = tl.abs(y) * 512.0 + 8388608.0
    small = steps.to(tl.int32, bitcast=True) & 15
    code = tl.where(tl.abs(y) < 0.015625, small, normal)
    return (tl.minimum(tl.maximum(code, 0), 126) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _decoded(code):
    """fp32 numbers of e4m3 bits."""
    size = code.to(tl.int32) & 127
    normal = ((size + 960) << 20).to(tl.float32, bitcast=True)
    number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    return tl.where((code.to(tl.int32) & 128) != 0, -number, number)


@triton.jit
def _to(x, bytes_, words, hidden, units, scale_word, out_units, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source, target = x + row * (units * ALIGN), bytes_ + row * (out_units * 16)
    top = tl.zeros((BLOCK,), dtype=tl.float32)
    odd = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        size = tl.abs(tl.load(source + columns, mask=columns < hidden, other=0.0).to(tl.float32))
        finite = size < float("inf")  # no NaN is
        top = tl.maximum(top, tl.where(finite, size, 0.0))
        odd = odd | tl.where(finite, 0, 1)
    scale = tl.maximum(tl.max(top, axis=0) * 0.002232142857142857, 1.1754943508222875e-38)  # 1 / 448, 2^-126
    bits = scale.to(tl.int32, bitcast=True) + 65535
    scale = (bits - (bits & 65535)).to(tl.float32, bitcast=True)
    scale = tl.where(tl.max(odd, axis=0) > 0, float("nan"), scale)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        number = tl.load(source + columns, mask=columns < hidden, other=0.0).to(tl.float32)
        tl.store(target + columns, _code(tl.div_rn(number, tl.zeros_like(number) + scale)), mask=columns < hidden)
    filling = hidden + tl.arange(0, 4)
    tl.store(target + filling, tl.zeros((4,), dtype=tl.uint8), mask=filling < scale_word * 4)
    words_ = scale_word + tl.arange(0, 4)
    tl.store(words + row * (out_units * 4) + words_, tl.zeros((4,), tl.float32) + scale, mask=words_ < out_units * 4)


@triton.jit
def _from(bytes_, words, x, hidden, scale_word, units, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(words + row * (units * 4) + scale_word)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < hidden
        number = _decoded(tl.load(bytes_ + row * (units * 16) + columns, mask=inside, other=0)) * scale
        tl.store(x + row * hidden + columns, number.to(x.dtype.element_ty), mask=inside)

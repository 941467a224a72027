"""Permute and unpermute as one launch each: rows gathered by index, and each token's rows summed in row order.

A program moves or sums one row at a time. Sums are fp32, ascending, rounded once, without atomics. Rows may be those
of a wider buffer (any row stride). Shapes: T tokens, N rows, H hidden, K rows of a token.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # elements at a time: 16 a thread
MAX_UNROLLED = 16


def gather_rows(x_TH: Tensor, rows_N: Tensor) -> Tensor:
    """[N, H]: row ``rows_N[n]`` of x at each n; unit stride along H."""
    hidden = x_TH.shape[1]
    y_NH = x_TH.new_empty(rows_N.shape[0], hidden)
    if y_NH.numel():
        align = gcd(x_TH.stride(0), 16)
        _gather[(rows_N.shape[0],)](
            x_TH, rows_N, y_NH, hidden, x_TH.stride(0) // align, ALIGN=align, BLOCK=_block(hidden), num_warps=4
        )
    return y_NH


def sum_rows(
    x_NH: Tensor, row_of_pair_N: Tensor, starts_T: Tensor, per_token: int | None, most: int | None = None
) -> Tensor:
    """[T, H] in the dtype of x: the sum of each token's rows in ascending order, zero for a token without rows.

    Args:
        x_NH: unit stride along H.
        row_of_pair_N: rows sorted by token, ascending within a token.
        starts_T: where each token's rows begin in ``row_of_pair_N``.
        per_token: K when every token has exactly K rows, else None.
        most: no token has more rows than this; None where nobody knows.
    """
    tokens, hidden = starts_T.shape[0], x_NH.shape[1]
    y_TH = x_NH.new_empty(tokens, hidden)
    if y_TH.numel():
        bound = most if per_token is None else per_token
        unrolled = bound if bound is not None and bound <= MAX_UNROLLED else 0
        align = gcd(x_NH.stride(0), 16)
        _sum[(tokens,)](
            x_NH, row_of_pair_N, starts_T, y_TH,
            tokens, row_of_pair_N.shape[0], hidden, x_NH.stride(0) // align,
            UNROLLED=unrolled, EXACT=per_token is not None, ALIGN=align, BLOCK=_block(hidden), num_warps=4,
        )  # fmt: skip
    return y_TH


def _block(hidden: int) -> int:
    return min(triton.next_power_of_2(hidden), _BLOCK)


@triton.jit
def _gather(x, rows, y, hidden, units, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + place) * (units * ALIGN)  # times a constant: so Triton knows the alignment
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < hidden
        tl.store(y + place * hidden + columns, tl.load(x + source + columns, mask=inside), mask=inside)


@triton.jit
def rows_of_token(starts, token, tokens, rows):
    """Where the rows of ``token`` begin and end in ``row_of_pair``, which has ``rows``."""
    first = tl.load(starts + token)
    return first, tl.load(starts + token + 1, mask=token + 1 < tokens, other=rows)


@triton.jit
def store_sum_of_rows(
    x, row_of_pair, first, last, target, hidden, stride,
    UNROLLED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """At ``target`` [hidden] the fp32 sum of the rows ``row_of_pair[first:last]`` of x in ascending order.

    There are UNROLLED of them, or without EXACT at most as many; 0: any number.
    """
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < hidden
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        if UNROLLED > 0:
            for pair in tl.static_range(UNROLLED):  # all loads in flight at once
                if EXACT:
                    row = tl.load(row_of_pair + first + pair).to(tl.int64)
                    total += tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
                else:
                    row = tl.load(row_of_pair + first + pair, mask=first + pair < last, other=0).to(tl.int64)
                    there = inside & (first + pair + columns * 0 < last)
                    total += tl.load(x + row * stride + columns, mask=there, other=0.0).to(tl.float32)
        else:
            for pair in range(first, last):
                row = tl.load(row_of_pair + pair).to(tl.int64)
                total += tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + columns, total.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _sum(
    x, row_of_pair, starts, y, tokens, rows, hidden, units,
    UNROLLED: tl.constexpr, EXACT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    stride = units * ALIGN
    first, last = rows_of_token(starts, token, tokens, rows)
    store_sum_of_rows(x, row_of_pair, first, last, y + token * hidden, hidden, stride, UNROLLED, EXACT, BLOCK)

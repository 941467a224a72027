"""Payload rows, tokens with their probability behind them, as one launch for each direction.

A program moves one row, or sums the rows of one token. Probabilities are moved bit for bit: their kernels see integers
of their size, in a view of the payload. Sums are fp32, ascending, rounded once, without atomics. Rows may be those of a
wider buffer.
Shapes: T tokens, E experts, N rows before dispatch, R rows after it, H hidden, W payload width.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluid_npu.device.kernels.payload_tail import TAIL_BYTES, payload_width
from fluid_npu.device.kernels.triton_permute import MAX_UNROLLED, rows_of_token, store_sum_of_rows

_BLOCK = 2048  # elements at a time: 16 a thread
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_tokens(x_TH: Tensor, probs_TE: Tensor, token_of_row: Tensor, pair_index: Tensor) -> Tensor:
    """[N, W]: the token of each row, and the entry ``pair_index`` of the contiguous probabilities."""
    hidden, rows = x_TH.shape[1], token_of_row.shape[0]
    payload = x_TH.new_empty(rows, payload_width(hidden, x_TH.dtype))
    if rows:
        align, out = gcd(x_TH.stride(0), 16), gcd(payload.stride(0), 16)
        _pack[(rows,)](
            x_TH, bits(probs_TE), token_of_row, pair_index, payload, bits(payload, probs_TE.dtype),
            hidden, x_TH.stride(0) // align, payload.stride(0) // out,
            ALIGN=align, OUT=out, TAIL=TAIL_BYTES // probs_TE.element_size(),
            RATIO=probs_TE.element_size() // x_TH.element_size(), BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip
    return payload


def unpack_rows(payload_RW: Tensor, hidden: int, wire: torch.dtype, rows_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """[R, H] tokens and [R] probabilities of payload row ``rows_R[r]``, or of row r, at each r; contiguous."""
    rows = payload_RW.shape[0]
    x_RH, p_R = payload_RW.new_empty(rows, hidden), torch.empty(rows, dtype=wire, device=payload_RW.device)
    if rows:
        align = gcd(payload_RW.stride(0), 16)
        _unpack[(rows,)](
            payload_RW, bits(payload_RW, wire), p_R if rows_R is None else rows_R, x_RH, bits(p_R),
            hidden, payload_RW.stride(0) // align,
            ALIGN=align, RATIO=wire.itemsize // x_RH.element_size(), ORDERED=rows_R is not None,
            BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip
    return x_RH, p_R


def pack_rows(x_RH: Tensor, p_R: Tensor, rows_R: Tensor | None) -> Tensor:
    """[R, W]: row r of x and of p at payload row ``rows_R[r]``, or r; ``rows_R`` is a permutation."""
    rows, hidden = x_RH.shape
    payload = x_RH.new_empty(rows, payload_width(hidden, x_RH.dtype))
    if rows:
        align, out = gcd(x_RH.stride(0), 16), gcd(payload.stride(0), 16)
        _pack_rows[(rows,)](
            x_RH, bits(p_R), p_R if rows_R is None else rows_R, payload, bits(payload, p_R.dtype),
            hidden, x_RH.stride(0) // align, p_R.stride(0), payload.stride(0) // out,
            ALIGN=align, OUT=out, TAIL=TAIL_BYTES // p_R.element_size(),
            RATIO=p_R.element_size() // x_RH.element_size(), ORDERED=rows_R is not None,
            BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip
    return payload


def sum_payload(
    payload_NW: Tensor,
    wire: torch.dtype,
    row_of_pair: Tensor,
    starts_T: Tensor,
    pair_index: Tensor,
    shape: tuple[int, int, int | None],
) -> tuple[Tensor, Tensor]:
    """([T, H] sums of each token's rows, [T, E] of dtype ``wire``: each pair's probability, zero elsewhere).

    ``shape`` is H, E and, when every token has exactly K rows, K.
    """
    hidden, experts, per_token = shape
    tokens, rows = starts_T.shape[0], row_of_pair.shape[0]
    dx_TH = payload_NW.new_empty(tokens, hidden)
    dp_TE = torch.empty(tokens, experts, dtype=wire, device=payload_NW.device)
    if tokens:
        align = gcd(payload_NW.stride(0), 16)
        _sum_payload[(tokens,)](
            payload_NW, bits(payload_NW, wire), row_of_pair, starts_T, pair_index, dx_TH, bits(dp_TE),
            tokens, rows, hidden, experts, payload_NW.stride(0) // align,
            UNROLLED=per_token if per_token is not None and per_token <= MAX_UNROLLED else 0,
            ALIGN=align, RATIO=wire.itemsize // payload_NW.element_size(),
            EXPERTS=triton.next_power_of_2(experts), BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip
    return dx_TH, dp_TE


def bits(x: Tensor, wire: torch.dtype | None = None) -> Tensor:
    """x as integers of its own size, or of ``wire``'s, which must divide where its rows begin."""
    return x.view(_BITS[(x.dtype if wire is None else wire).itemsize])


def block_of(hidden: int) -> int:
    """Columns that a program moves at a time."""
    return min(triton.next_power_of_2(hidden), _BLOCK)


@triton.jit
def _copy_row(source, target, hidden, BLOCK: tl.constexpr):
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < hidden
        tl.store(target + columns, tl.load(source + columns, mask=inside), mask=inside)


@triton.jit
def _pack(
    x, probs, token_of_row, pair_index, payload, tail, hidden, units, out_units,
    ALIGN: tl.constexpr, OUT: tl.constexpr, TAIL: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_of_row + row)
    p = tl.load(probs + tl.load(pair_index + row))
    _copy_row(x + token * (units * ALIGN), payload + row * (out_units * OUT), hidden, BLOCK)
    first = (row * (out_units * OUT) + hidden) // RATIO
    tl.store(tail + first + tl.arange(0, TAIL), tl.broadcast_to(p, (TAIL,)))


@triton.jit
def _unpack(
    payload, tail, rows, x, p, hidden, units,
    ALIGN: tl.constexpr, RATIO: tl.constexpr, ORDERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = place
    if ORDERED:
        row = tl.load(rows + place)
    source = row * (units * ALIGN)
    _copy_row(payload + source, x + place * hidden, hidden, BLOCK)
    tl.store(p + place, tl.load(tail + (source + hidden) // RATIO))


@triton.jit
def _pack_rows(
    x, p, rows, payload, tail, hidden, units, stride_p, out_units,
    ALIGN: tl.constexpr, OUT: tl.constexpr, TAIL: tl.constexpr, RATIO: tl.constexpr, ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = place
    if ORDERED:
        row = tl.load(rows + place)
    own = tl.load(p + place * stride_p)
    _copy_row(x + place * (units * ALIGN), payload + row * (out_units * OUT), hidden, BLOCK)
    first = (row * (out_units * OUT) + hidden) // RATIO
    tl.store(tail + first + tl.arange(0, TAIL), tl.broadcast_to(own, (TAIL,)))


@triton.jit
def _sum_payload(
    payload, tail, row_of_pair, starts, pair_index, dx, dp, tokens, rows, hidden, experts, units,
    UNROLLED: tl.constexpr, ALIGN: tl.constexpr, RATIO: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    stride = units * ALIGN
    first, last = rows_of_token(starts, token, tokens, rows)
    store_sum_of_rows(payload, row_of_pair, first, last, dx + token * hidden, hidden, stride, UNROLLED, True, BLOCK)
    numbers = tl.arange(0, EXPERTS)
    probs = tl.zeros((EXPERTS,), dtype=dp.dtype.element_ty)
    for pair in range(first, last):
        row = tl.load(row_of_pair + pair)
        expert = tl.load(pair_index + row) - token * experts
        probs = tl.where(numbers == expert, tl.load(tail + (row * stride + hidden) // RATIO), probs)
    tl.store(dp + token * experts + numbers, probs, mask=numbers < experts)

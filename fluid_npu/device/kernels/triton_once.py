"""Rows of tokens that go once to each rank: found, packed, expanded to rows of experts and added up again.

One launch each; a payload row is as in ``ops.payload_once``: [H token columns | S probabilities | S expert numbers |
filling], the tail in integers of the probabilities' size. Sums are fp32, ascending, rounded once, without atomics.
Shapes: T tokens, G groups of L experts (E = G * L), N rows before dispatch, M rows received, R rows of experts, S
slots, H hidden, W payload width.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluid_npu.device.kernels.routed import RoutedRows, RowIndices, Slots
from fluid_npu.device.kernels.triton_payload import _copy_row, bits, block_of
from fluid_npu.device.kernels.triton_permute import MAX_UNROLLED, rows_of_token, store_sum_of_rows
from fluid_npu.device.kernels.triton_routing import blocks_of, entries_of_groups, routed_rows, tokens_of_groups

_ROWS = 32  # of received slots that a program reads


def once_rows(map_TE: Tensor, groups: int, most: int) -> RoutedRows:
    """Rows of a contiguous bool map by group and then token, one for each (token, group) with an expert.

    Index tensors have room for ``most`` rows a token; as many as there are rows count. ``counts_E`` is [G, 1 + L]: rows
    of each group, then of each of its experts. ``pair_index`` is a position in a flattened [T, G] tensor.
    """
    tokens, experts = map_TE.shape
    local, room = experts // groups, tokens * most
    indices = torch.empty(3, room, dtype=torch.int64, device=map_TE.device)
    starts_T, counts_GC = indices.new_empty(tokens), indices.new_empty(groups, 1 + local)
    if tokens == 0:
        counts_GC.zero_()
    else:
        wide, deep = triton.next_power_of_2(groups), triton.next_power_of_2(local)
        block, step = blocks_of(tokens, wide * deep)
        _once_rows[(triton.cdiv(tokens, block),)](
            map_TE.view(torch.uint8), indices, starts_T, counts_GC, tokens, groups, local, room,
            GROUPS=wide, LOCAL=deep, BLOCK=block, STEP=step, num_warps=8,
        )  # fmt: skip
    token_of_row, pair_index, row_of_pair = indices.unbind(0)
    return RoutedRows(token_of_row, row_of_pair, starts_T, pair_index, counts_GC)


def pack_once(x_TH: Tensor, probs_TE: Tensor, map_TE: Tensor, rows: RowIndices, slots: Slots) -> Tensor:
    """[N, W]: each row's token, the probabilities of its experts in its group, and their numbers there."""
    hidden, number, experts = x_TH.shape[1], rows.token_of_row.shape[0], map_TE.shape[1]
    payload = x_TH.new_empty(number, slots.width(hidden, x_TH.dtype))
    if number:
        align, out = gcd(x_TH.stride(0), 16), gcd(payload.stride(0), 16)
        _pack_once[(number,)](
            x_TH, bits(probs_TE), map_TE.view(torch.uint8), rows.token_of_row, rows.pair_index, payload,
            bits(payload, slots.wire), hidden, x_TH.stride(0) // align, payload.stride(0) // out,
            experts // slots.local, slots.local, slots.number,
            ALIGN=align, OUT=out, RATIO=slots.wire.itemsize // x_TH.element_size(), TAIL=slots.columns,
            COLUMNS=triton.next_power_of_2(slots.columns), LOCAL=triton.next_power_of_2(slots.local),
            BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip
    return payload


def sum_once(payload_NW: Tensor, map_TE: Tensor, rows: RowIndices, slots: Slots, most: int) -> tuple[Tensor, Tensor]:
    """([T, H] sums of each token's rows, [T, E] the probability in each expert's slot, zero for the others)."""
    tokens, experts = map_TE.shape
    hidden = slots.hidden(payload_NW)
    dx_TH = payload_NW.new_empty(tokens, hidden)
    dp_TE = torch.empty(tokens, experts, dtype=slots.wire, device=payload_NW.device)
    if tokens:
        align = gcd(payload_NW.stride(0), 16)
        _sum_once[(tokens,)](
            payload_NW, bits(payload_NW, slots.wire), map_TE.view(torch.uint8), rows.row_of_pair, rows.bag_offsets,
            dx_TH, bits(dp_TE), tokens, rows.row_of_pair.shape[0], hidden, experts // slots.local, slots.local,
            payload_NW.stride(0) // align,
            UNROLLED=most if most <= MAX_UNROLLED else 0, ALIGN=align,
            EVERY=rows.row_of_pair.shape[0] == tokens * (experts // slots.local),
            RATIO=slots.wire.itemsize // payload_NW.element_size(), LOCAL=triton.next_power_of_2(slots.local),
            BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip
    return dx_TH, dp_TE


def arrived_rows(payload_MW: Tensor, slots: Slots, num_rows: int) -> RoutedRows:
    """The R = ``num_rows`` rows that the slots of received rows ask for, by expert and then received row.

    ``pair_index`` is a position in a flattened [M, S] tensor.
    """
    return routed_rows(slots_to_map(payload_MW, slots), num_rows, slots=slots.number)


def slots_to_map(payload_MW: Tensor, slots: Slots) -> Tensor:
    """bool [M, L]: which experts the slots of received rows ask for."""
    rows = payload_MW.shape[0]
    map_ML = torch.empty(rows, slots.local, dtype=torch.bool, device=payload_MW.device)
    if rows:
        _slots_to_map[(triton.cdiv(rows, _ROWS),)](
            bits(payload_MW, slots.wire), map_ML.view(torch.uint8), rows, slots.hidden(payload_MW), slots.local,
            payload_MW.stride(0), RATIO=slots.wire.itemsize // payload_MW.element_size(), SLOTS=slots.number,
            LOCAL=triton.next_power_of_2(slots.local), BLOCK=_ROWS, num_warps=4,
        )  # fmt: skip
    return map_ML


def expand_rows(payload_MW: Tensor, rows: RowIndices, slots: Slots) -> tuple[Tensor, Tensor]:
    """([R, H], [R]): the token of each expert's row and the probability in its slot."""
    number, hidden = rows.token_of_row.shape[0], slots.hidden(payload_MW)
    x_RH = payload_MW.new_empty(number, hidden)
    p_R = torch.empty(number, dtype=slots.wire, device=payload_MW.device)
    if number:
        align = gcd(payload_MW.stride(0), 16)
        _expand[(number,)](
            payload_MW, bits(payload_MW, slots.wire), rows.token_of_row, rows.pair_index, x_RH, bits(p_R),
            hidden, payload_MW.stride(0) // align, slots.number,
            ALIGN=align, RATIO=slots.wire.itemsize // x_RH.element_size(), BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip
    return x_RH, p_R


def reduce_rows(dx_RH: Tensor, dp_R: Tensor, rows: RowIndices, slots: Slots) -> Tensor:
    """[M, W]: the sum over each received row's experts, and the gradient of each slot's probability."""
    hidden, received = dx_RH.shape[1], rows.bag_offsets.shape[0]
    payload = dx_RH.new_empty(received, slots.width(hidden, dx_RH.dtype))
    if received:
        align, out = gcd(dx_RH.stride(0), 16), gcd(payload.stride(0), 16)
        _reduce[(received,)](
            dx_RH, bits(dp_R), rows.row_of_pair, rows.bag_offsets, payload, bits(payload, slots.wire),
            received, dx_RH.shape[0], hidden, dx_RH.stride(0) // align, dp_R.stride(0), payload.stride(0) // out,
            UNROLLED=slots.number if slots.number <= MAX_UNROLLED else 0, ALIGN=align, OUT=out,
            RATIO=slots.wire.itemsize // dx_RH.element_size(), TAIL=slots.columns,
            COLUMNS=triton.next_power_of_2(slots.columns), BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip
    return payload


@triton.jit
def _once_rows(
    chosen, indices, starts, counts, tokens, groups, local, room,
    GROUPS: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    g, member = tl.arange(0, GROUPS), tl.arange(0, LOCAL)
    expert = g[:, None] * local + member[None, :]
    known = (g < groups)[:, None] & (member < local)[None, :]
    experts = groups * local
    before, total, of_experts = tokens_of_groups(chosen, first, tokens, experts, expert, known, STEP, OVER=0)
    first_row = tl.cumsum(total, 0) - total
    at = first + tl.arange(0, BLOCK)
    entry = entries_of_groups(chosen, at, tokens, experts, expert, known)[1]
    wanted = tl.max(entry.to(tl.int32), 2)
    row = (first_row + before)[None, :] + tl.cumsum(wanted, 0) - wanted
    of_token = tl.sum(wanted, 1)
    start_of_token = tl.sum(before) + tl.cumsum(of_token, 0) - of_token
    pair = start_of_token[:, None] + tl.cumsum(wanted, 1) - wanted
    here = (wanted != 0) & (row < room) & (pair < room)
    token = at.to(tl.int64)[:, None] + tl.zeros((BLOCK, GROUPS), dtype=tl.int64)
    tl.store(indices + row, token, mask=here)
    tl.store(indices + room + row, token * groups + g[None, :], mask=here)
    tl.store(indices + 2 * room + pair, row.to(tl.int64), mask=here)
    tl.store(starts + at, start_of_token.to(tl.int64), mask=at < tokens)
    if tl.program_id(0) == 0:
        tl.store(counts + g * (1 + local), total.to(tl.int64), mask=g < groups)
        column = g[:, None] * (1 + local) + 1 + member[None, :]
        tl.store(counts + column, of_experts.to(tl.int64), mask=known)


@triton.jit
def _pack_once(
    x, probs, chosen, token_of_row, pair_index, payload, tail,
    hidden, units, out_units, groups, local, slots,
    ALIGN: tl.constexpr, OUT: tl.constexpr, RATIO: tl.constexpr, TAIL: tl.constexpr, COLUMNS: tl.constexpr,
    LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_of_row + row)
    group = tl.load(pair_index + row) - token * groups
    target = row * (out_units * OUT)
    _copy_row(x + token * (units * ALIGN), payload + target, hidden, BLOCK)
    member = tl.arange(0, LOCAL)
    entries = (token * groups + group) * local + member
    entry = tl.load(chosen + entries, mask=member < local, other=0).to(tl.int32)
    slot = tl.cumsum(entry, 0) - entry
    here = (entry != 0) & (slot < slots)
    first = tail + (target + hidden) // RATIO
    p = tl.load(probs + entries, mask=here, other=0)
    tl.store(first + slot, p, mask=here)
    tl.store(first + slots + slot, member.to(tail.dtype.element_ty), mask=here)
    filled = tl.sum(entry, 0)
    column = tl.arange(0, COLUMNS)
    numbers = (column >= slots) & (column < 2 * slots)
    free = (column >= filled) & ((column < slots) | (column >= slots + filled)) & (column < TAIL)
    filling = tl.where(numbers, local, 0).to(tail.dtype.element_ty)
    tl.store(first + column, filling, mask=free)


@triton.jit
def _sum_once(
    payload, tail, chosen, row_of_pair, starts, dx, dp, tokens, rows, hidden, groups, local, units,
    UNROLLED: tl.constexpr, ALIGN: tl.constexpr, EVERY: tl.constexpr, RATIO: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    stride = units * ALIGN
    first, last = rows_of_token(starts, token, tokens, rows)
    store_sum_of_rows(payload, row_of_pair, first, last, dx + token * hidden, hidden, stride, UNROLLED, False, BLOCK)
    member = tl.arange(0, LOCAL)
    seen = first
    for group in range(0, groups):
        entries = (token * groups + group) * local + member
        entry = tl.load(chosen + entries, mask=member < local, other=0).to(tl.int32)
        # Of a block without room for its tokens rows are missing: then nothing is used, and nothing read outside.
        entry = tl.where(seen + member * 0 < rows, entry, 0)
        wanted = tl.max(entry, 0)
        row = tl.load(row_of_pair + seen, mask=wanted != 0, other=0)
        slot = tl.cumsum(entry, 0) - entry
        p = tl.load(tail + (row * stride + hidden) // RATIO + slot, mask=entry != 0, other=0)
        tl.store(dp + entries, p, mask=member < local)
        if EVERY:  # tokens have a row in every group, wanted there or not
            seen += 1
        else:
            seen += wanted


@triton.jit
def _slots_to_map(
    tail, chosen, rows, hidden, local, stride,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    member = tl.arange(0, LOCAL)
    entry = tl.zeros((BLOCK, LOCAL), dtype=tl.int32)
    first = tail + (at * stride + hidden) // RATIO + SLOTS
    for slot in tl.static_range(SLOTS):
        number = tl.load(first + slot, mask=at < rows, other=-1).to(tl.int32)
        entry = tl.where(number[:, None] == member[None, :], 1, entry)
    inside = (at < rows)[:, None] & (member < local)[None, :]
    tl.store(chosen + at[:, None] * local + member[None, :], entry.to(tl.uint8), mask=inside)


@triton.jit
def _expand(
    payload, tail, token_of_row, pair_index, x, p, hidden, units, slots,
    ALIGN: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_of_row + row)
    source = token * (units * ALIGN)
    slot = tl.load(pair_index + row) - token * slots
    _copy_row(payload + source, x + row * hidden, hidden, BLOCK)
    tl.store(p + row, tl.load(tail + (source + hidden) // RATIO + slot))


@triton.jit
def _reduce(
    dx, dp, row_of_pair, starts, payload, tail, received, rows, hidden, units, stride_p, out_units,
    UNROLLED: tl.constexpr, ALIGN: tl.constexpr, OUT: tl.constexpr, RATIO: tl.constexpr, TAIL: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    first, last = rows_of_token(starts, number, received, rows)
    target = number * (out_units * OUT)
    store_sum_of_rows(dx, row_of_pair, first, last, payload + target, hidden, units * ALIGN, UNROLLED, False, BLOCK)
    # A received row's slots ascend by expert, and so do its rows: slot s belongs to its s-th row.
    column = tl.arange(0, COLUMNS)
    filled = column < last - first
    row = tl.load(row_of_pair + first + column, mask=filled, other=0)
    own = tl.load(dp + row * stride_p, mask=filled, other=0)
    tl.store(tail + (target + hidden) // RATIO + column, own, mask=column < TAIL)

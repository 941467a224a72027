"""Rows of tokens that every rank sends to every rank: where each goes is found and used without the host.

A received row has slots (``ops.payload_once``); ``place`` says for each the row of the experts that it becomes, -1 for
an empty one, and the filled slots of a row come first. So a received row is read once and written to its experts' rows,
and what they computed is added up, both by a walk over its slots: rows of the experts' buffers that no slot names are
neither read nor written. Where more rows are asked for than the buffers have, the last ones have no place: nothing may
be used of the step then, but nothing is read or written outside either. Sums are fp32, by ascending expert, rounded
once, without atomics.
Shapes: M rows received, S slots, L local experts, C rows of the experts' buffers, H hidden, W payload width.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluid_npu.device.kernels.routed import Slots
from fluid_npu.device.kernels.triton_once import slots_to_map
from fluid_npu.device.kernels.triton_payload import bits, block_of
from fluid_npu.device.kernels.triton_permute import MAX_UNROLLED, store_sum_of_rows
from fluid_npu.device.kernels.triton_routing import blocks_of, rows_of_block


def place_rows(payload_MW: Tensor, slots: Slots, capacity: int) -> tuple[Tensor, Tensor]:
    """(int32 [M, S]: row of each slot, by expert and then received row, -1 for none; int32 [L]: where each ends).

    ``capacity``: C; slots whose row would be behind it have none, and no end is behind it.
    """
    rows, local = payload_MW.shape[0], slots.local
    place_MS = torch.empty(rows, slots.number, dtype=torch.int32, device=payload_MW.device)
    ends_L = torch.empty(local, dtype=torch.int32, device=payload_MW.device)
    if rows == 0:
        return place_MS, ends_L.zero_()
    map_ML = slots_to_map(payload_MW, slots)
    width = triton.next_power_of_2(local)
    block, step = blocks_of(rows, width)
    _place[(triton.cdiv(rows, block),)](
        map_ML.view(torch.uint8), place_MS, ends_L, rows, local, capacity,
        EXPERTS=width, SLOTS=slots.number, WIDE=triton.next_power_of_2(slots.number), BLOCK=block, STEP=step,
        num_warps=8,
    )  # fmt: skip
    return place_MS, ends_L


def expand_rows(payload_MW: Tensor, place_MS: Tensor, capacity: int, slots: Slots) -> tuple[Tensor, Tensor]:
    """([C, H], [C]): tokens and probabilities at the places of their slots."""
    hidden = slots.hidden(payload_MW)
    x_CH = payload_MW.new_empty(capacity, hidden)
    p_C = torch.empty(capacity, dtype=slots.wire, device=payload_MW.device)
    ratio = slots.wire.itemsize // payload_MW.element_size()
    _launch_spread(payload_MW, bits(payload_MW, slots.wire), place_MS, x_CH, bits(p_C), hidden, ratio)
    return x_CH, p_C


def spread_rows(rows_MH: Tensor, place_MS: Tensor, capacity: int) -> Tensor:
    """[C, H]: each row at the places of its slots."""
    y_CH = rows_MH.new_empty(capacity, rows_MH.shape[1])
    _launch_spread(rows_MH, rows_MH, place_MS, y_CH, y_CH, rows_MH.shape[1], 0)
    return y_CH


def sum_rows(x_CH: Tensor, place_MS: Tensor) -> Tensor:
    """[M, H]: the sum over each received row's slots, zero for a row without one."""
    y_MH = x_CH.new_empty(place_MS.shape[0], x_CH.shape[1])
    _launch_sum(x_CH, x_CH, place_MS, y_MH, y_MH, 0, 1)
    return y_MH


def reduce_rows(dx_CH: Tensor, dp_C: Tensor, place_MS: Tensor, slots: Slots) -> Tensor:
    """[M, W]: the sum over each received row's slots, and the gradient of each slot's probability."""
    payload_MW = dx_CH.new_empty(place_MS.shape[0], slots.width(dx_CH.shape[1], dx_CH.dtype))
    ratio = slots.wire.itemsize // dx_CH.element_size()
    _launch_sum(dx_CH, bits(dp_C), place_MS, payload_MW, bits(payload_MW, slots.wire), slots.columns, ratio)
    return payload_MW


def _launch_spread(source: Tensor, tail: Tensor, place: Tensor, x: Tensor, p: Tensor, hidden: int, ratio: int) -> None:
    rows, slots = place.shape
    if rows:
        align, out = gcd(source.stride(0), 16), gcd(x.stride(0), 16)
        _spread[(rows,)](
            source, tail, place, x, p, hidden, source.stride(0) // align, x.stride(0) // out,
            SLOTS=slots, RATIO=ratio, ALIGN=align, OUT=out, BLOCK=block_of(hidden), num_warps=4,
        )  # fmt: skip


def _launch_sum(x: Tensor, p: Tensor, place: Tensor, target: Tensor, tail: Tensor, columns: int, ratio: int) -> None:
    rows, slots = place.shape
    if rows:
        align, out = gcd(x.stride(0), 16), gcd(target.stride(0), 16)
        _sum[(rows,)](
            x, p, place, target, tail, x.shape[1], slots, x.stride(0) // align, p.stride(0), target.stride(0) // out,
            UNROLLED=slots if slots <= MAX_UNROLLED else 0, WIDE=triton.next_power_of_2(slots), ALIGN=align, OUT=out,
            RATIO=ratio, TAIL=columns, COLUMNS=triton.next_power_of_2(max(columns, 1)), BLOCK=block_of(x.shape[1]),
            num_warps=4,
        )  # fmt: skip


@triton.jit
def _place(
    chosen, place, ends, rows, local, capacity,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    numbers, column = tl.arange(0, EXPERTS), tl.arange(0, WIDE)
    at = (first + tl.arange(0, BLOCK)).to(tl.int64)
    entry, row, before, total = rows_of_block(chosen, first, rows, local, EXPERTS, BLOCK, STEP)
    # A received row's slots ascend by expert, and so do their rows: the filled ones stay the first without the last.
    entry = tl.where(row < capacity, entry, 0)
    slot = tl.cumsum(entry, 1) - entry
    tl.store(place + at[:, None] * SLOTS + slot, row, mask=(entry != 0) & (slot < SLOTS))
    free = (column[None, :] >= tl.sum(entry, 1)[:, None]) & (column < SLOTS)[None, :] & (at < rows)[:, None]
    tl.store(place + at[:, None] * SLOTS + column[None, :], tl.full((BLOCK, WIDE), -1, tl.int32), mask=free)
    if tl.program_id(0) == 0:
        tl.store(ends + numbers, tl.minimum(tl.cumsum(total, 0), capacity), mask=numbers < local)


@triton.jit
def _spread(
    source, tail, place, x, p, hidden, units, out_units,
    SLOTS: tl.constexpr, RATIO: tl.constexpr, ALIGN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    own = place + number * SLOTS
    start_of_row = number * (units * ALIGN)  # times a constant: so Triton knows the alignment
    if tl.load(own) >= 0:
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < hidden
            values = tl.load(source + start_of_row + columns, mask=inside)
            for slot in tl.static_range(SLOTS):
                row = tl.load(own + slot).to(tl.int64)
                tl.store(x + row * (out_units * OUT) + columns, values, mask=inside & (columns * 0 + row >= 0))
        if RATIO > 0:
            for slot in tl.static_range(SLOTS):
                row = tl.load(own + slot).to(tl.int64)
                value = tl.load(tail + (start_of_row + hidden) // RATIO + slot)
                tl.store(p + row, value, mask=row >= 0)


@triton.jit
def _sum(
    x, p, place, target, tail, hidden, slots, units, stride_p, out_units,
    UNROLLED: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr, OUT: tl.constexpr, RATIO: tl.constexpr,
    TAIL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    first = number * slots
    slot = tl.arange(0, WIDE)
    filled = tl.sum((tl.load(place + first + slot, mask=slot < slots, other=-1) >= 0).to(tl.int32), 0)
    start_of_row = number * (out_units * OUT)
    store_sum_of_rows(
        x, place, first, first + filled, target + start_of_row, hidden, units * ALIGN, UNROLLED, False, BLOCK
    )
    if TAIL > 0:
        column = tl.arange(0, COLUMNS)
        row = tl.load(place + first + column, mask=column < slots, other=-1).to(tl.int64)
        value = tl.load(p + row * stride_p, mask=row >= 0, other=0)
        tl.store(tail + (start_of_row + hidden) // RATIO + column, value, mask=column < TAIL)

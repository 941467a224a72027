"""Which rows a routing map means, and the order of received chunks, as one launch each and without the host.

All counts are exact integers and every position is computed from them, so the order is the same on every run: no
atomics. Shapes: T tokens, E experts, N rows of this rank, C sources, L local experts, R received rows.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluid_npu.device.kernels.routed import ChunkOrder, RoutedRows

_PROGRAMS = 128  # about as many as an accelerator runs at a time
_TILE = 8192  # entries of the map that a program holds at a time
_BLOCK = 1024
MAX_EXPERTS = 1024
MAX_CHUNKS = 8192


def routed_rows(map_TE: Tensor, num_rows: int, slots: int = 0) -> RoutedRows:
    """Rows of a contiguous bool map by expert and then token. ``num_rows`` is N, as many as the map has entries True.

    With ``slots``, S, ``pair_index`` is the position of each row's slot in a flattened [T, S] tensor: its place among
    its token's rows. Each program counts what comes before its tokens by reading the whole map, which the cache keeps.
    """
    tokens, experts = map_TE.shape
    indices = torch.empty(3, num_rows, dtype=torch.int64, device=map_TE.device)
    starts_T, counts_E = indices.new_empty(tokens), indices.new_empty(experts)
    if tokens == 0 or experts == 0:
        counts_E.zero_()
    else:
        width = triton.next_power_of_2(experts)
        block, step = blocks_of(tokens, width)
        _routed_rows[(triton.cdiv(tokens, block),)](
            map_TE.view(torch.uint8), indices, starts_T, counts_E, tokens, experts, num_rows,
            EXPERTS=width, SLOTS=slots, BLOCK=block, STEP=step, FILL=_BLOCK, num_warps=8,
        )  # fmt: skip
    token_of_row, pair_index, row_of_pair = indices.unbind(0)
    return RoutedRows(token_of_row, row_of_pair, starts_T, pair_index, counts_E)


def blocks_of(tokens: int, width: int) -> tuple[int, int]:
    """(tokens of a program, tokens that it counts at a time), powers of 2, for a map with ``width`` padded columns."""
    step = max(16, _TILE // width)
    return min(step, max(16, triton.next_power_of_2(triton.cdiv(tokens, _PROGRAMS)))), step


def chunk_order(counts_CL: Tensor, rows: int) -> ChunkOrder:
    """The order of ``rows`` rows that come in chunks by (source, expert) and are wanted by (expert, source).

    ``counts_CL`` has unit stride along L.
    """
    sources, local = counts_CL.shape
    order = torch.empty(2, rows, dtype=torch.int64, device=counts_CL.device)
    ends_L = torch.empty(local, dtype=torch.int32, device=counts_CL.device)
    chunks = sources * local
    _chunk_order[(chunks,)](
        counts_CL, order, ends_L, sources, local, rows, counts_CL.stride(0),
        CHUNKS=triton.next_power_of_2(chunks), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return ChunkOrder(order[0], order[1], ends_L)


@triton.jit
def rows_of_block(
    chosen, first, tokens, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Of the tokens ``first`` to ``first + BLOCK`` and all experts: int32 [BLOCK, EXPERTS] entries of the map and their
    rows, and [EXPERTS] rows of each expert before these tokens, and of all tokens."""
    numbers = tl.arange(0, EXPERTS)
    before_2d = tl.zeros((STEP, EXPERTS), dtype=tl.int32)
    after_2d = tl.zeros((STEP, EXPERTS), dtype=tl.int32)
    for start in range(0, tokens, STEP):
        at = start + tl.arange(0, STEP)
        inside = (at < tokens)[:, None] & (numbers < experts)[None, :]
        entry = tl.load(chosen + at[:, None] * experts + numbers[None, :], mask=inside, other=0).to(tl.int32)
        earlier = (at < first)[:, None]
        before_2d += tl.where(earlier, entry, 0)
        after_2d += tl.where(earlier, 0, entry)
    before = tl.sum(before_2d, 0)
    total = before + tl.sum(after_2d, 0)
    first_row = tl.cumsum(total, 0) - total
    at = first + tl.arange(0, BLOCK)
    inside = (at < tokens)[:, None] & (numbers < experts)[None, :]
    entry = tl.load(chosen + at[:, None] * experts + numbers[None, :], mask=inside, other=0).to(tl.int32)
    row = (first_row + before)[None, :] + tl.cumsum(entry, 0) - entry
    return entry, row, before, total


@triton.jit
def entries_of_groups(chosen, at, tokens, experts, expert, known):
    """Of the tokens ``at`` and the experts ``expert`` [G, L]: places in the map, and its entries, zero where an expert
    is not ``known``; both [tokens, G, L]."""
    inside = (at < tokens)[:, None, None] & known[None, :, :]
    place = at[:, None, None] * experts + expert[None, :, :]
    return place, tl.load(chosen + place, mask=inside, other=0)


@triton.jit
def tokens_of_groups(chosen, first, tokens, experts, expert, known, STEP: tl.constexpr, OVER: tl.constexpr):
    """Of groups of experts ``expert`` [G, L], where ``known``: int32 [G] tokens before ``first`` that want a group, and
    of all tokens; and the entries of the map, of all steps, summed over tokens (OVER 0: [G, L]) or over the experts of
    a group (OVER 2: [STEP, G], which is no sum across threads in the loop)."""
    GROUPS: tl.constexpr = expert.shape[0]
    LOCAL: tl.constexpr = expert.shape[1]
    before_2d = tl.zeros((STEP, GROUPS), dtype=tl.int32)
    after_2d = tl.zeros((STEP, GROUPS), dtype=tl.int32)
    sums = tl.zeros((GROUPS, LOCAL) if OVER == 0 else (STEP, GROUPS), dtype=tl.int32)
    for start in range(0, tokens, STEP):
        at = start + tl.arange(0, STEP)
        entry = entries_of_groups(chosen, at, tokens, experts, expert, known)[1].to(tl.int32)
        wanted = tl.max(entry, 2)
        earlier = (at < first)[:, None]
        before_2d += tl.where(earlier, wanted, 0)
        after_2d += tl.where(earlier, 0, wanted)
        sums += tl.sum(entry, OVER)
    before = tl.sum(before_2d, 0)
    return before, before + tl.sum(after_2d, 0), sums


@triton.jit
def _routed_rows(
    chosen, indices, starts, counts, tokens, experts, num_rows,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    numbers = tl.arange(0, EXPERTS)
    at = first + tl.arange(0, BLOCK)
    entry, row, before, total = rows_of_block(chosen, first, tokens, experts, EXPERTS, BLOCK, STEP)
    of_token = tl.sum(entry, 1)
    start_of_token = tl.sum(before) + tl.cumsum(of_token, 0) - of_token
    slot = tl.cumsum(entry, 1) - entry
    pair = start_of_token[:, None] + slot
    # Of a map with more entries than promised the last rows are left out, and no index points outside either.
    here = (entry != 0) & (row < num_rows)
    token = at.to(tl.int64)[:, None] + tl.zeros((BLOCK, EXPERTS), dtype=tl.int64)
    tl.store(indices + row, token, mask=here)
    if SLOTS > 0:
        tl.store(indices + num_rows + row, token * SLOTS + slot, mask=here)
    else:
        tl.store(indices + num_rows + row, token * experts + numbers[None, :], mask=here)
    known = tl.minimum(row, num_rows - 1).to(tl.int64)
    tl.store(indices + 2 * num_rows + pair, known, mask=(entry != 0) & (pair < num_rows))
    tl.store(starts + at, tl.minimum(start_of_token, num_rows).to(tl.int64), mask=at < tokens)
    if tl.program_id(0) == 0:
        tl.store(counts + numbers, total.to(tl.int64), mask=numbers < experts)
        # A map with fewer entries than promised: no index may point outside, whatever else goes wrong.
        for start in range(tl.sum(total), num_rows, FILL):
            at_row = start + tl.arange(0, FILL)
            for part in tl.static_range(3):
                tl.store(indices + part * num_rows + at_row, tl.zeros((FILL,), tl.int64), mask=at_row < num_rows)


@triton.jit
def _chunk_order(
    counts, order, ends, sources, local, rows, stride, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    chunk = tl.program_id(0)
    source, expert = chunk // local, chunk % local
    every = tl.arange(0, CHUNKS)
    sources_of, experts_of = every // local, every % local
    count = tl.load(counts + sources_of * stride + experts_of, mask=every < sources * local, other=0)
    earlier = (experts_of < expert) | ((experts_of == expert) & (sources_of < source))
    arrives = tl.sum(tl.where(every < chunk, count, 0))
    wanted = tl.sum(tl.where(earlier, count, 0))
    own = tl.sum(tl.where(every == chunk, count, 0))
    for start in range(0, own, BLOCK):
        step = start + tl.arange(0, BLOCK)
        inside = step < own
        tl.store(order + wanted + step, arrives + step, mask=inside)
        tl.store(order + rows + arrives + step, wanted + step, mask=inside)
    if source == sources - 1:
        tl.store(ends + expert, (wanted + own).to(tl.int32))

"""Rows of tokens that go once to each rank, in blocks of a fixed number of rows for each: found by one launch.

What ``ops.once_bounded`` says in plain torch, by its bits. Wanted rows are put into a group's block by token, so those
of group g before token t number min(how many tokens before t want g, room of g), and the filling likewise: each program
counts what comes before its tokens by reading the whole map, which the cache keeps, and needs no other. No atomics.
Shapes: T tokens, G groups of L experts (E = G * L), N rows.
"""

# mypy: allow-untyped-defs
# (what a Triton kernel takes has types of Triton's own, and its annotations are compiled)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluid_npu.device.kernels.routed import RoutedRows
from fluid_npu.device.kernels.triton_routing import blocks_of, entries_of_groups, tokens_of_groups


def bounded_rows(map_TE: Tensor, room_G: Tensor, rows: int, told: Tensor, masked: bool) -> tuple[RoutedRows, Tensor]:
    """(Rows by group, those that were asked for first in their block; the map without experts of closed groups).

    Args:
        map_TE: bool, contiguous, of at least one token.
        room_G: int64 rows of each group's block, at most T; -1 for a closed group.
        rows: N, their sum.
        told: int32 [1 + G], contiguous: gets whether some group lacks room, and (token, expert) pairs of each group.
        masked: whether some group is closed; without one the second result is the given map.
    """
    tokens, number = map_TE.shape
    groups = room_G.shape[0]
    indices = torch.empty(3, rows, dtype=torch.int64, device=map_TE.device)
    starts_T = indices.new_empty(tokens)
    seen_TE = torch.empty_like(map_TE) if masked else map_TE
    wide, deep = triton.next_power_of_2(groups), triton.next_power_of_2(number // groups)
    block, step = blocks_of(tokens, wide * deep)
    _bounded_rows[(triton.cdiv(tokens, block),)](
        map_TE.view(torch.uint8), room_G, indices, starts_T, told, seen_TE.view(torch.uint8),
        tokens, groups, number // groups, rows,
        GROUPS=wide, LOCAL=deep, MASKED=masked, BLOCK=block, STEP=step, num_warps=8,
    )  # fmt: skip
    token_of_row, pair_index, row_of_pair = indices.unbind(0)
    return RoutedRows(token_of_row, row_of_pair, starts_T, pair_index), seen_TE


@triton.jit
def _bounded_rows(
    chosen, rooms, indices, starts, told, seen, tokens, groups, local, rows,
    GROUPS: tl.constexpr, LOCAL: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    g, member = tl.arange(0, GROUPS), tl.arange(0, LOCAL)
    given = tl.load(rooms + g, mask=g < groups, other=-1).to(tl.int32)
    room = tl.maximum(given, 0)
    expert = g[:, None] * local + member[None, :]
    looked_at = (given >= 0)[:, None] & (member < local)[None, :]
    experts = groups * local
    before, total, pairs_2d = tokens_of_groups(chosen, first, tokens, experts, expert, looked_at, STEP, OVER=2)
    kept = tl.minimum(total, room)  # rows of a group that were asked for and have a place; the filling is behind them

    at = first + tl.arange(0, BLOCK)
    place, entry = entries_of_groups(chosen, at, tokens, experts, expert, looked_at)
    if MASKED:
        there = (at < tokens)[:, None, None] & ((g < groups)[:, None] & (member < local)[None, :])[None, :, :]
        tl.store(seen + place, entry, mask=there)
    wanted = tl.max(entry.to(tl.int32), 2)
    asked = before[None, :] + tl.cumsum(wanted, 0) - wanted  # tokens before this one that want the group
    free = at[:, None] - asked  # and those that do not
    in_block = tl.where(wanted != 0, asked, total[None, :] + free)
    here = (in_block < room[None, :]) & (at < tokens)[:, None]
    row = ((tl.cumsum(room, 0) - room)[None, :] + in_block).to(tl.int64)
    token = at.to(tl.int64)[:, None] + tl.zeros((BLOCK, GROUPS), dtype=tl.int64)
    tl.store(indices + row, token, mask=here)
    tl.store(indices + rows + row, token * groups + g[None, :], mask=here)
    # By token, and all of the filling behind all that was asked for.
    own = (here & (wanted != 0)).to(tl.int32)
    filling = here.to(tl.int32) - own
    start_of_token = tl.sum(tl.minimum(asked, room[None, :]), 1)
    filled = tl.sum(kept) + tl.sum(tl.minimum(free, (room - kept)[None, :]), 1)
    own_at = start_of_token[:, None] + tl.cumsum(own, 1) - own
    filling_at = filled[:, None] + tl.cumsum(filling, 1) - filling
    pair = tl.where(own != 0, own_at, filling_at)
    tl.store(indices + 2 * rows + pair, row, mask=here)
    tl.store(starts + at, start_of_token.to(tl.int64), mask=at < tokens)
    if tl.program_id(0) == 0:
        tl.store(told + 1 + g, tl.sum(pairs_2d, 0), mask=g < groups)
        tl.store(told, tl.max((total > room).to(tl.int32), 0))

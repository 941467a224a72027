"""Rows of a dispatch that sends a token once to each rank, in blocks of a fixed number of rows for each.

The host knows all sizes before anybody has routed anything. What is left of a block is filled with the first tokens
that have no expert there, as Megatron's ``drop_and_pad`` fills an expert's rows: such a row has no slot, its receiver
computes nothing for it and sends zeros back. Of a block that is too small for its tokens the last ones are missing, so
nothing may be used of the step then; ``bounded_groups`` says so.

T tokens, E experts, G groups of L, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.routed import RoutedRows
from fluid_npu.ops.once import OnceLayout, every_group
from fluid_npu.ops.permute import PermuteLayout


def bounded_groups(
    map_TE: Tensor, topk: int, room_G: Sequence[int | None], told: Tensor | None = None
) -> tuple[OnceLayout, Tensor]:
    """(``room_G[g]`` rows for each group, by group; what other ranks must be told, int32 [1 + G] on the device).

    Told are whether some group has too few rows, 1 or 0, and then how many (token, expert) each group has. Rows that
    were asked for come first in their block, by token. In sums over a token's rows the filling, which is zero there,
    belongs to the last token: kernels that walk over more rows than ``most_rows`` see it. The host waits for nothing.

    Args:
        map_TE: bool; a token has at most ``topk`` experts (not checked).
        topk: K.
        room_G: at most T each; None for a closed group: nothing is sent to it, and its experts are not looked at.
        told: where to write that, contiguous; None for a tensor of its own.
    """
    (tokens, num_experts), groups = map_TE.shape, len(room_G)
    blocks = _blocks(tuple(room_G), num_experts // groups, map_TE.device)
    if told is None:
        told = torch.empty(1 + groups, dtype=torch.int32, device=map_TE.device)
    found = None
    if tokens:
        found = kernels_of(map_TE).bounded_rows(map_TE, blocks.room_G, blocks.rows, told, blocks.some_are_closed)
    every = all(room == tokens for room in room_G) or not tokens
    if found is None:
        # Sums over a token's rows read the map too: of a closed group they must find nothing there.
        seen_TE = map_TE & blocks.open_E if blocks.some_are_closed else map_TE
        rows = None if every else _plain_rows(seen_TE, blocks)
        _tell(seen_TE, blocks, told)
    else:
        rows, seen_TE = found
    if every or rows is None:
        return every_group(seen_TE, topk, groups), told
    layout = PermuteLayout(
        num_tokens=tokens,
        num_experts=groups,
        pairs_per_token=None,
        padded=True,
        token_of_row=rows.token_of_row,
        row_of_pair=rows.row_of_pair,
        bag_offsets=rows.bag_offsets,
        pair_index=rows.pair_index,
        most_rows=min(topk, groups),
    )
    return OnceLayout(rows=layout, num_experts=num_experts, topk=topk, map_TE=seen_TE), told


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one dispatch: numbers on the host and, as they are needed, on the device."""

    rooms: tuple[int | None, ...]
    local: int
    """L."""
    device: torch.device

    @property
    def rows(self) -> int:
        """N."""
        return sum(room or 0 for room in self.rooms)

    @property
    def some_are_closed(self) -> bool:
        """Whether there are groups whose experts are not looked at."""
        return None in self.rooms

    @cached_property
    def room_G(self) -> Tensor:
        """int64 [G]: rows of each block, -1 for a closed group."""
        return torch.tensor([-1 if room is None else room for room in self.rooms], device=self.device)

    @cached_property
    def of_G1(self) -> tuple[Tensor, Tensor]:
        """int64 [G, 1]: rows of each block, and where it starts."""
        rooms = [room or 0 for room in self.rooms]
        starts = [sum(rooms[:group]) for group in range(len(rooms))]
        room_G1, first_G1 = (torch.tensor(each, device=self.device).unsqueeze(1) for each in (rooms, starts))
        return room_G1, first_G1

    @cached_property
    def open_E(self) -> Tensor:
        """bool [E]: experts of groups that are not closed."""
        return torch.tensor([room is not None for room in self.rooms for _ in range(self.local)], device=self.device)


@cache
def _blocks(rooms: tuple[int | None, ...], local: int, device: torch.device) -> _Blocks:
    """Made once, since a recording copies nothing from the host, and kept for good, since it reads these tensors at
    every replay; nothing writes into them."""
    return _Blocks(rooms, local, device)


def _plain_rows(seen_TE: Tensor, blocks: _Blocks) -> RoutedRows:
    """In plain torch. Of experts of closed groups the map says no."""
    tokens, groups, rows = seen_TE.shape[0], len(blocks.rooms), blocks.rows
    room_G1, first_G1 = blocks.of_G1
    number_T, pair_GT = _numbers(groups, tokens, seen_TE.device)
    # By group and then token: running totals along memory.
    wanted_GT = seen_TE.view(tokens, groups, -1).any(2).t().contiguous()
    total_GT = wanted_GT.cumsum(1)
    place_GT = torch.where(wanted_GT, total_GT - 1, total_GT[:, -1:] + number_T - total_GT)
    there_GT = place_GT < room_G1
    row_GT = torch.where(there_GT, first_G1 + place_GT, rows)  # the others behind the end
    pair_index = number_T.new_empty(rows + 1).scatter_(0, row_GT.view(-1), pair_GT.view(-1))[:rows]
    kept_TG, filling_TG = ((there_GT & of).t().reshape(-1) for of in (wanted_GT, ~wanted_GT))
    kept_ends, filling_ends = kept_TG.cumsum(0), filling_TG.cumsum(0)
    at = torch.where(kept_TG, kept_ends - 1, torch.where(filling_TG, kept_ends[-1] + filling_ends - 1, rows))
    row_of_pair = number_T.new_empty(rows + 1).scatter_(0, at, row_GT.t().reshape(-1))[:rows]
    return RoutedRows(
        token_of_row=torch.div(pair_index, groups, rounding_mode="floor"),
        row_of_pair=row_of_pair,
        bag_offsets=(kept_ends - kept_TG.long()).view(tokens, groups)[:, 0].contiguous(),
        pair_index=pair_index,
    )


def _tell(seen_TE: Tensor, blocks: _Blocks, told: Tensor) -> None:
    """In plain torch; closed groups want nothing of a room of 0."""
    seen_TGL = seen_TE.view(seen_TE.shape[0], len(blocks.rooms), blocks.local)
    told[0] = (seen_TGL.any(2).sum(0) > blocks.of_G1[0].view(-1)).any()
    told[1:] = seen_TGL.sum((0, 2))


@lru_cache(maxsize=64)
def _numbers(groups: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """([T] tokens, [G, T] places in a flattened [T, G] tensor), made once like ``_blocks``."""
    number_T, group_G1 = torch.arange(tokens, device=device), torch.arange(groups, device=device).unsqueeze(1)
    return number_T, number_T * groups + group_G1

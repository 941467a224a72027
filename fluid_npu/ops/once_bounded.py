"""Rows of a dispatch that sends a token once to each rank, in blocks of a fixed number of rows for each.

The host knows all sizes before anybody has routed anything. What is left of a block is filled with the first tokens
that have no expert there, as Megatron's ``drop_and_pad`` fills an expert's rows: such a row has no slot, its receiver
computes nothing for it and sends zeros back. Of a block that is too small for its tokens the last ones are missing, so
nothing may be used of the step then; ``bounded_groups`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fluid_npu.ops.once import OnceLayout, every_group
from fluid_npu.ops.permute import PermuteLayout


def bounded_groups(map_TE: Tensor, topk: int, room_G: Sequence[int]) -> tuple[OnceLayout, Tensor]:
    """(``room_G[g]`` rows for each of G groups, by group; a bool scalar: whether they are too few for some group).

    Rows that were asked for come first in their block, by token. In sums over a token's rows the filling, which is zero
    there, belongs to the last token: kernels that walk over more rows than ``most_rows`` see it. T tokens, E experts, N
    rows. The host waits for nothing.

    Args:
        map_TE: bool; a token has at most ``topk`` experts (not checked).
        topk: K.
        room_G: at most T each, and not T for all.
    """
    (tokens, experts), groups, device = map_TE.shape, len(room_G), map_TE.device
    if all(room == tokens for room in room_G):
        return every_group(map_TE, topk, groups), torch.zeros((), dtype=torch.bool, device=device)
    rows = sum(room_G)
    room_G1, first_G1, number_T, pair_GT = _constants(tuple(room_G), tokens, device)
    # By group and then token: running totals along memory.
    wanted_GT = map_TE.view(tokens, groups, -1).any(2).t().contiguous()
    total_GT = wanted_GT.cumsum(1)
    count_G1 = total_GT[:, -1:]
    place_GT = torch.where(wanted_GT, total_GT - 1, count_G1 + number_T - total_GT)
    there_GT = place_GT < room_G1
    row_GT = torch.where(there_GT, first_G1 + place_GT, rows)  # the others behind the end
    pair_index = number_T.new_empty(rows + 1).scatter_(0, row_GT.view(-1), pair_GT.view(-1))[:rows]
    kept_TG, filling_TG = ((there_GT & of).t().reshape(-1) for of in (wanted_GT, ~wanted_GT))
    kept_ends, filling_ends = kept_TG.cumsum(0), filling_TG.cumsum(0)
    at = torch.where(kept_TG, kept_ends - 1, torch.where(filling_TG, kept_ends[-1] + filling_ends - 1, rows))
    row_of_pair = number_T.new_empty(rows + 1).scatter_(0, at, row_GT.t().reshape(-1))[:rows]
    layout = PermuteLayout(
        num_tokens=tokens,
        num_experts=groups,
        pairs_per_token=None,
        padded=True,
        token_of_row=torch.div(pair_index, groups, rounding_mode="floor"),
        row_of_pair=row_of_pair,
        bag_offsets=(kept_ends - kept_TG.long()).view(tokens, groups)[:, 0].contiguous(),
        pair_index=pair_index,
        most_rows=min(topk, groups),
    )
    return OnceLayout(rows=layout, num_experts=experts, topk=topk, map_TE=map_TE), (count_G1 > room_G1).any()


@lru_cache(maxsize=64)
def _constants(room_G: tuple[int, ...], tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """([G, 1] rows of each block, [G, 1] where it starts, [T] tokens, [G, T] places in a flattened [T, G] tensor).

    Made once, since a recording copies nothing from the host; nothing writes into them.
    """
    starts_G = [sum(room_G[:group]) for group in range(len(room_G))]
    room_G1, first_G1 = (torch.tensor(each, device=device).unsqueeze(1) for each in (room_G, starts_G))
    number_T, group_G1 = torch.arange(tokens, device=device), torch.arange(len(room_G), device=device).unsqueeze(1)
    return room_G1, first_G1, number_T, number_T * len(room_G) + group_G1

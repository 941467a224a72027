"""Which rows a dispatch has that sends a token once to each group of experts, however many of them it chose.

A group is the experts behind one destination: a rank's, or, were rows sent across nodes first, a node's. A row has
*slots*, one for each expert of the group that its token may have chosen: the expert's number inside the group,
ascending, then the group's size where there is none. The groups of a next hop are found from the slots of the rows that
arrived by the same functions.

T tokens, E experts, K slots of a token, G groups of L = E/G experts, N rows, S slots of a row, min(K, L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluid_npu.ops.permute import PermuteLayout


@dataclass(frozen=True, kw_only=True)
class OnceLayout:
    """One row for each (token, group) that has an expert, by group and then token. Index tensors are int64."""

    rows: PermuteLayout
    """Tokens and groups, in the place of tokens and experts."""
    num_experts: int
    """E."""
    slot_expert: Tensor
    """[N, S] number of each slot's expert inside the group, L for none."""
    slot_pair: Tensor
    """[N, S] position of each slot's (token, expert) in a flattened [T, E] tensor, T*E for none."""

    @property
    def num_slots(self) -> int:
        """S."""
        return self.slot_expert.shape[1]


def experts_of_tokens(map_TE: Tensor, slots: int) -> Tensor:
    """[T, slots]: each token's experts, ascending, then E. No token may have more than ``slots`` (not checked)."""
    num_experts = map_TE.shape[1]
    numbers_E = torch.arange(num_experts, device=map_TE.device)
    return torch.where(map_TE, numbers_E, num_experts).sort(dim=1)[0][:, :slots]


def groups_of_tokens(expert_TK: Tensor, num_experts: int, groups: int) -> Tensor:
    """[T, G] bool: whether a token has an expert in each group, from slots [T, K]."""
    group_TK = torch.div(expert_TK, num_experts // groups, rounding_mode="floor")
    found = torch.zeros(expert_TK.shape[0], groups + 1, dtype=torch.bool, device=expert_TK.device)
    return found.scatter_(1, group_TK, True)[:, :groups]


def once_layout(expert_TK: Tensor, map_TG: Tensor, num_experts: int, num_rows: int) -> OnceLayout:
    """The rows of slots [T, K] and the ``map_TG`` that ``groups_of_tokens`` gives; the host knows their number."""
    (num_tokens, topk), groups = expert_TK.shape, map_TG.shape[1]
    size = num_experts // groups
    rows = PermuteLayout.from_routing_map(map_TG, num_rows=num_rows, most_rows=min(topk, groups))
    expert_NK = expert_TK.index_select(0, rows.token_of_row)
    group_N1 = (rows.pair_index % groups).unsqueeze(1)
    group_NK = torch.div(expert_NK, size, rounding_mode="floor")
    # A token's experts ascend, so those of one group are neighbours: from where the lower groups end.
    place_NS = (group_NK < group_N1).sum(1, keepdim=True) + torch.arange(min(topk, size), device=expert_TK.device)
    inside_NS = place_NS.clamp(max=topk - 1)
    filled = (place_NS < topk) & (group_NK.gather(1, inside_NS) == group_N1)
    slot_NS = expert_NK.gather(1, inside_NS)
    pair_NS = slot_NS + (rows.token_of_row * num_experts).unsqueeze(1)
    return OnceLayout(
        rows=rows,
        num_experts=num_experts,
        slot_expert=torch.where(filled, slot_NS - group_N1 * size, size),
        slot_pair=torch.where(filled, pair_NS, num_tokens * num_experts),
    )

"""Which rows a dispatch has that sends a token once to each group of experts, however many of them it chose.

A group is the experts behind one destination: a rank's, or, were rows sent across nodes first, a node's. A row has
*slots*, one for each expert of the group that its token may have chosen: the expert's number inside the group,
ascending, then the group's size where there is none. The groups of a next hop are found from the slots of the rows that
arrived by the same functions.

T tokens, E experts, K slots of a token, G groups of L = E/G experts, N rows, S slots of a row, min(K, L).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.routed import RoutedRows
from fluid_npu.ops.chunk_rows import chunk_of
from fluid_npu.ops.permute import PermuteLayout


@dataclass(frozen=True, kw_only=True)
class OnceLayout:
    """One row for each (token, group) that has an expert, by group and then token. Index tensors are int64."""

    rows: PermuteLayout
    """Tokens and groups, in the place of tokens and experts."""
    num_experts: int
    """E."""
    topk: int
    """K."""
    map_TE: Tensor | None = None
    """bool [T, E]: who chose whom; None where only ``expert_TK`` says it. One of the two is there."""
    expert_TK: Tensor | None = None
    """[T, K]: what ``experts_of_tokens`` gives."""

    @property
    def num_slots(self) -> int:
        """S."""
        return min(self.topk, self.local)

    @property
    def slot_expert(self) -> Tensor:
        """[N, S] number of each slot's expert inside the group, L for none."""
        return self._slots[0]

    @property
    def slot_pair(self) -> Tensor:
        """[N, S] position of each slot's (token, expert) in a flattened [T, E] tensor, T*E for none."""
        return self._slots[1]

    @property
    def slot_place(self) -> Tensor:
        """[N, S] position of each slot's expert in flattened slots of the tokens [T, K], T*K for none."""
        return self._slots[2]

    @property
    def local(self) -> int:
        """L."""
        return self.num_experts // self.rows.num_experts

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """For plain torch; kernels that read the map itself do without."""
        rows, size, groups, topk = self.rows, self.local, self.rows.num_experts, self.topk
        expert_TK = self.expert_TK
        if expert_TK is None:
            assert self.map_TE is not None, "a layout knows its tokens' experts"
            expert_TK = experts_of_tokens(self.map_TE, topk)
        expert_NK = expert_TK.index_select(0, rows.token_of_row)
        group_N1 = (rows.pair_index % groups).unsqueeze(1)
        group_NK = torch.div(expert_NK, size, rounding_mode="floor")
        # A token's experts ascend, so those of one group are neighbours: from where the lower groups end.
        place_NS = (group_NK < group_N1).sum(1, keepdim=True) + torch.arange(self.num_slots, device=expert_TK.device)
        inside_NS = place_NS.clamp(max=topk - 1)
        filled = (place_NS < topk) & (group_NK.gather(1, inside_NS) == group_N1)
        slot_NS = expert_NK.gather(1, inside_NS)
        pair_NS = slot_NS + (rows.token_of_row * self.num_experts).unsqueeze(1)
        expert_NS = torch.where(filled, slot_NS - group_N1 * size, size)
        pair_NS = torch.where(filled, pair_NS, rows.num_tokens * self.num_experts)
        at_NS = torch.where(filled, place_NS + (rows.token_of_row * topk).unsqueeze(1), rows.num_tokens * topk)
        return expert_NS, pair_NS, at_NS


def once_counts(map_TE: Tensor, topk: int, groups: int) -> tuple[Tensor, Callable[[int], OnceLayout]]:
    """([G, 1 + L] rows of each group, then of each of its experts; the layout, given how many rows there are).

    No token may have more than ``topk`` experts (not checked). Other ranks wait for the counts, and the host must know
    them before it knows the number of rows.
    """
    num_experts = map_TE.shape[1]
    found = kernels_of(map_TE).once_rows(map_TE, groups, min(topk, groups))
    if found is not None and found.counts_E is not None:
        whole = found
        return found.counts_E, lambda rows: _layout_of(whole, rows, map_TE, topk, groups)
    expert_TK = experts_of_tokens(map_TE, topk)
    map_TG = groups_of_tokens(expert_TK, num_experts, groups)
    counts_GC = torch.cat([map_TG.sum(0).unsqueeze(1), map_TE.sum(0).view(groups, -1)], dim=1)
    return counts_GC, lambda rows: once_layout(expert_TK, map_TG, num_experts, rows, map_TE)


def every_group(map_TE: Tensor, topk: int, groups: int, first: int | None = None) -> OnceLayout:
    """A row for every (token, group), wanted there or not: the host knows their number, and nothing is counted.

    Rows are by group, with those of group ``first``, if there is one, before the others.
    """
    tokens, num_experts = map_TE.shape
    rows = _rows_of_every_group(tokens, groups, map_TE.device, first)
    return OnceLayout(rows=rows, num_experts=num_experts, topk=topk, map_TE=map_TE)


@lru_cache(maxsize=16)
def _rows_of_every_group(tokens: int, groups: int, device: torch.device, first: int | None) -> PermuteLayout:
    """Made once for a number of tokens: nothing writes into a layout."""
    token_GT = torch.arange(tokens, device=device).expand(groups, tokens)
    order = sorted(range(groups), key=lambda group: group != first)
    group_G1, place_G1 = (torch.tensor(each, device=device).unsqueeze(1) for each in (order, _inverse(order)))
    return PermuteLayout(
        num_tokens=tokens,
        num_experts=groups,
        pairs_per_token=groups,
        padded=False,
        token_of_row=token_GT.reshape(-1),
        row_of_pair=(place_G1 * tokens + token_GT).t().reshape(-1),
        bag_offsets=torch.arange(0, tokens * groups, groups, device=device),
        pair_index=(token_GT * groups + group_G1).reshape(-1),
        most_rows=groups,
    )


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def rows_of_layout(layout: OnceLayout, rows: slice) -> OnceLayout:
    """Some rows of a layout, to send: what belongs to sums over rows is not cut, and must not be used."""
    return replace(layout, rows=chunk_of(layout.rows, rows))


def _layout_of(found: RoutedRows, num_rows: int, map_TE: Tensor, topk: int, groups: int) -> OnceLayout:
    num_tokens, num_experts = map_TE.shape
    kept = {name: getattr(found, name)[:num_rows] for name in ("token_of_row", "row_of_pair", "pair_index")}
    rows = PermuteLayout.of_routed(found._replace(**kept), num_tokens, groups, most_rows=min(topk, groups))
    return OnceLayout(rows=rows, num_experts=num_experts, topk=topk, map_TE=map_TE)


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


def once_layout(
    expert_TK: Tensor, map_TG: Tensor, num_experts: int, num_rows: int, map_TE: Tensor | None = None
) -> OnceLayout:
    """The rows of slots [T, K] and the ``map_TG`` that ``groups_of_tokens`` gives; the host knows their number."""
    topk, groups = expert_TK.shape[1], map_TG.shape[1]
    rows = PermuteLayout.from_routing_map(map_TG, num_rows=num_rows, most_rows=min(topk, groups))
    return OnceLayout(rows=rows, num_experts=num_experts, topk=topk, map_TE=map_TE, expert_TK=expert_TK)

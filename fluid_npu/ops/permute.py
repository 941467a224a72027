"""Permute tokens to the rows of their experts and sum the rows back, by index and without atomics.

Shapes: T tokens, E experts, H hidden, K experts per token, N rows (T*K when dropless). Rows are ordered by expert,
within an expert by token, exactly as in Megatron-Core's own ``permute``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.routed import RoutedRows, bag_offsets


@dataclass(frozen=True, kw_only=True)
class PermuteLayout:
    """Where each row comes from and which rows each token sums. Index tensors are int64."""

    num_tokens: int
    num_experts: int
    pairs_per_token: int | None
    """K when every token has exactly K rows, else None."""
    padded: bool
    """Rows may belong to tokens that were not routed there (capacity with padding)."""
    token_of_row: Tensor
    """[N]: the token that each row copies."""
    row_of_pair: Tensor
    """[N]: rows sorted by token, ascending within a token."""
    bag_offsets: Tensor
    """[T]: where each token's rows start in ``row_of_pair``."""
    pair_index: Tensor
    """[N]: position of each row's (token, expert) in a flattened [T, E] tensor."""
    most_rows: int | None = None
    """No token has more rows than this; None where the host does not know."""

    @property
    def num_rows(self) -> int:
        """N."""
        return self.token_of_row.shape[0]

    @cached_property
    def experts_TK(self) -> Tensor | None:
        """[T, K]: experts of each token, ascending; None when K varies or rows are padded."""
        if self.pairs_per_token is None or self.padded:
            return None
        experts = self.pair_index.index_select(0, self.row_of_pair) % self.num_experts
        return experts.view(self.num_tokens, self.pairs_per_token)

    @staticmethod
    def from_routing_map(
        map_TE: Tensor,
        uniform_topk: int | None = None,
        num_rows: int | None = None,
        most_rows: int | None = None,
        routed: RoutedRows | None = None,
    ) -> PermuteLayout:
        """Layout of a bool map [T, E]: one row for each True.

        ``uniform_topk`` is K when each token is known to have exactly K experts (not checked): fewer operators,
        and no host synchronisation on an accelerator. Leave it None when tokens were dropped. ``num_rows`` is N
        where the host knows it, which spares the synchronisation too; ``most_rows`` as the field; ``routed`` what
        ``counts_of_experts`` found.
        """
        num_tokens, num_experts = map_TE.shape
        if uniform_topk is not None:
            num_rows = num_tokens * uniform_topk
        if routed is None:
            routed = kernels_of(map_TE).routed_rows(map_TE, num_rows, uniform_topk)
        return PermuteLayout.of_routed(routed, num_tokens, num_experts, uniform_topk, most_rows)

    @staticmethod
    def of_routed(
        routed: RoutedRows,
        num_tokens: int,
        num_experts: int,
        uniform_topk: int | None = None,
        most_rows: int | None = None,
    ) -> PermuteLayout:
        """The layout of rows that a kernel found; none of them is padding."""
        return PermuteLayout(
            num_tokens=num_tokens,
            num_experts=num_experts,
            pairs_per_token=uniform_topk,
            padded=False,
            token_of_row=routed.token_of_row,
            row_of_pair=routed.row_of_pair,
            bag_offsets=routed.bag_offsets,
            pair_index=routed.pair_index,
            most_rows=most_rows,
        )

    @staticmethod
    def from_capacity(map_TE: Tensor, capacity: int) -> PermuteLayout:
        """Layout in which every expert has exactly ``capacity`` rows, as Megatron's ``drop_and_pad``.

        An expert with fewer tokens is padded with the first tokens not routed to it; their probability is what
        the [T, E] probabilities hold there, 0 after Megatron's router. Raises ValueError if capacity exceeds T.
        """
        num_tokens, num_experts = map_TE.shape
        if capacity > num_tokens:
            raise ValueError(
                f"capacity is {capacity} and there are {num_tokens} tokens; an expert cannot hold a token twice; "
                "lower moe_expert_capacity_factor"
            )
        order_ET = map_TE.t().to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        tokens_EC = order_ET[:, :capacity]
        experts_E1 = torch.arange(num_experts, device=map_TE.device).unsqueeze(-1)
        token_of_row = tokens_EC.reshape(-1)
        sorted_tokens, row_of_pair = torch.sort(token_of_row, stable=True)
        return PermuteLayout(
            num_tokens=num_tokens,
            num_experts=num_experts,
            pairs_per_token=None,
            padded=True,
            token_of_row=token_of_row,
            row_of_pair=row_of_pair,
            bag_offsets=bag_offsets(sorted_tokens, num_tokens, None),
            pair_index=torch.add(experts_E1, tokens_EC, alpha=num_experts).reshape(-1),
        )

    @staticmethod
    def from_slots(expert_TS: Tensor, num_rows: int) -> PermuteLayout:
        """Layout of integer slots [T, S]: each token's experts in ascending order, then numbers above every expert's.

        Only the ``num_rows`` slots of experts get rows; the host must know how many there are. Here ``pair_index``
        is a position in a flattened [T, S] tensor, and ``num_experts`` is S.
        """
        num_tokens, slots = expert_TS.shape
        slot_of_row = torch.sort(expert_TS.reshape(-1), stable=True)[1][:num_rows]
        token_of_row = torch.div(slot_of_row, slots, rounding_mode="floor")
        sorted_tokens, row_of_pair = torch.sort(token_of_row, stable=True)
        return PermuteLayout(
            num_tokens=num_tokens,
            num_experts=slots,
            pairs_per_token=None,
            padded=False,
            token_of_row=token_of_row,
            row_of_pair=row_of_pair,
            bag_offsets=bag_offsets(sorted_tokens, num_tokens, None),
            pair_index=slot_of_row,
            most_rows=slots,
        )


def counts_of_experts(map_TE: Tensor, uniform_topk: int | None = None) -> tuple[Tensor, RoutedRows | None]:
    """([E] rows of each expert, what ``PermuteLayout.from_routing_map`` takes as ``routed``) of a bool map.

    Other ranks wait for the counts, so they come before the rest where that is a launch of its own.
    """
    rows = None if uniform_topk is None else map_TE.shape[0] * uniform_topk
    return kernels_of(map_TE).counts_and_rows(map_TE, rows)


def permute_tokens(x_TH: Tensor, layout: PermuteLayout) -> Tensor:
    """[N, H]: the token of each row; the gradient of a token is the sum over its rows."""
    return _Permute.apply(x_TH, layout)


def unpermute_tokens(x_NH: Tensor, layout: PermuteLayout) -> Tensor:
    """[T, H]: the sum of each token's rows in ascending expert order; zero for a token without rows."""
    return _Unpermute.apply(x_NH, layout)


def permuted_probs(probs_TE: Tensor, layout: PermuteLayout) -> Tensor:
    """[N]: the probability of each row, from the [T, E] probabilities of the router."""
    # torch's own node: its backward, an index_add_ of distinct entries, costs less than a Python one.
    return probs_TE.reshape(-1).index_select(0, layout.pair_index)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, layout: PermuteLayout) -> Tensor:
        ctx.layout = layout
        return kernels_of(x_TH).permute(x_TH, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor, None]:
        return kernels_of(dy_NH).unpermute(dy_NH.contiguous(), ctx.layout), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, layout: PermuteLayout) -> Tensor:
        ctx.layout = layout
        return kernels_of(x_NH).unpermute(x_NH, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, None]:
        return kernels_of(dy_TH).permute(dy_TH, ctx.layout), None

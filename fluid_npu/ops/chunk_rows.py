"""Rows of a dispatch in the order of its chunks, where a chunk holds some local experts of every rank, or some tokens.

Chunks of experts: ``PermuteLayout`` orders rows by expert, so the rows of a chunk are one piece for each rank. Here
whole experts are moved so that a chunk's rows are one piece altogether; the sum over a token's rows still runs in
ascending expert order.
Chunks of tokens: each has rows of every expert.
Rows that stay on their rank may be a chunk before all others, whose rows are then those of other ranks alone.
T tokens, E experts, N rows, P ranks, L local experts, C chunks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fluid_npu.ops.permute import PermuteLayout


def experts_by_chunk(experts: int, ranks: int, chunks: int, device: torch.device) -> Tensor:
    """int64 [E]: all experts, by (chunk, rank, local expert)."""
    numbers = torch.arange(experts, device=device)
    return numbers.view(ranks, chunks, -1).transpose(0, 1).reshape(-1)


def experts_own_first(experts: int, ranks: int, chunks: int, own: int, device: torch.device) -> Tensor:
    """int64 [E]: the local experts of rank ``own``, then those of all others, by (chunk, rank, local expert)."""
    by_rank = torch.arange(experts, device=device).view(ranks, chunks, -1)
    others = torch.cat([by_rank[:own], by_rank[own + 1 :]]).transpose(0, 1)
    return torch.cat([by_rank[own].reshape(-1), others.reshape(-1)])


def in_chunk_order(layout: PermuteLayout, counts_E: Tensor, order_E: Tensor) -> PermuteLayout:
    """The same rows with those of expert ``order_E[0]`` first, then of ``order_E[1]``, and so on.

    For sums over rows and for ``chunk_of``; ``Kernels.permute`` of the whole may give the old order on a device that
    sorts by expert itself. ``counts_E`` are the rows of each expert, on the layout's device; the host does not wait.
    """
    rows, device = layout.num_rows, counts_E.device
    moved_E = counts_E.index_select(0, order_E)
    shift_E = (counts_E.cumsum(0) - counts_E).index_select(0, order_E) - (moved_E.cumsum(0) - moved_E)
    place = torch.arange(rows, device=device)
    old_row = place + torch.repeat_interleave(shift_E, moved_E, output_size=rows)
    new_row = torch.empty_like(old_row).scatter_(0, old_row, place)
    return replace(
        layout,
        token_of_row=layout.token_of_row.index_select(0, old_row),
        row_of_pair=new_row.index_select(0, layout.row_of_pair),
        pair_index=layout.pair_index.index_select(0, old_row),
    )


def chunk_of(layout: PermuteLayout, rows: slice) -> PermuteLayout:
    """Some rows of a layout, to send: what belongs to sums over rows is not cut, and must not be used."""
    return replace(
        layout,
        pairs_per_token=None,
        token_of_row=layout.token_of_row[rows],
        pair_index=layout.pair_index[rows],
    )


def token_chunks(tokens: int, chunks: int) -> list[slice]:
    """So many neighbouring ranges of all tokens, as even as can be; some are empty where tokens are fewer."""
    ends = [tokens * number // chunks for number in range(chunks + 1)]
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]

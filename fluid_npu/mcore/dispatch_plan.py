"""What one dispatch decides and its combine must know: row order, split sizes, rows of each local expert.

T tokens, E experts, L local experts, P expert-parallel ranks, Q expert-tensor-parallel ranks, N rows of this
rank before dispatch, R rows after it. Received rows come by (tp rank, source rank, local expert); experts want them by
(local expert, tp rank, source rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fluid_npu.comm.guard import collective
from fluid_npu.ops.permute import PermuteLayout


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Everything that the steps after routing share. Index tensors are int64 on the tokens' device."""

    layout: PermuteLayout
    tokens_shape: torch.Size
    input_splits: list[int]
    """[P] rows sent to each expert-parallel rank."""
    output_splits: list[int]
    """[P] rows received from each, before any gather over the expert-tensor-parallel group."""
    gather_splits: list[int]
    """[Q] rows that each expert-tensor-parallel rank contributes; one entry without expert tensor parallelism."""
    tokens_per_expert: list[int]
    """[L] rows of each local expert."""
    order: tuple[Tensor, Tensor] | None
    """[R] which received row comes at each place of the experts' order, and the inverse; None when in order already."""


def exchange_counts(counts_E: Tensor, groups: ExpertGroups) -> Any:
    """Starts telling the other ranks how many rows they get; returns what ``finish_counts`` takes."""
    if groups.etp_size > 1:
        received = counts_E.new_empty(groups.etp_size * groups.ep_size * counts_E.shape[0])
        work = dist.all_gather_into_tensor(received, counts_E, group=groups.tp_ep, async_op=True)
    else:
        received = torch.empty_like(counts_E)
        work = dist.all_to_all_single(received, counts_E, group=groups.ep, async_op=True)
    return received, work


@dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """The process groups that a dispatch moves rows in, and this rank's place."""

    ep: Any
    etp: Any
    tp_ep: Any
    ep_size: int
    etp_size: int
    ep_rank: int
    etp_rank: int
    ranks: list[int]

    @property
    def alone(self) -> bool:
        """Whether no other rank holds or shares experts."""
        return self.ep_size * self.etp_size == 1


def finish_counts(pending: Any, groups: ExpertGroups, local_experts: int, name: str) -> Tensor:
    """``[Q, P, L]`` on the host: rows from each (tp rank, source rank) for each local expert."""
    received, work = pending
    with collective(f"token counts of {name}", groups.ranks):
        work.wait()
        host = received.cpu()
    if groups.etp_size == 1:
        return host.view(1, groups.ep_size, local_experts)
    by_rank = host.view(groups.ep_size, groups.etp_size, groups.ep_size, local_experts)
    return by_rank[:, :, groups.ep_rank].transpose(0, 1)


def make_plan(
    layout: PermuteLayout, tokens_shape: torch.Size, counts_E: Tensor, counts_QPL: Tensor, groups: ExpertGroups
) -> DispatchPlan:
    """The plan for these counts. ``counts_E``: rows of this rank per expert, on the host."""
    etp_size, ep_size, local_experts = counts_QPL.shape
    rank_QP = counts_QPL.sum(2)
    order = None
    if local_experts > 1 and etp_size * ep_size > 1:
        device = layout.token_of_row.device
        rows, inverse = _chunk_order(counts_QPL.reshape(-1, local_experts))
        order = rows.to(device), inverse.to(device)
    return DispatchPlan(
        layout=layout,
        tokens_shape=tokens_shape,
        input_splits=counts_E.view(ep_size, local_experts).sum(1).tolist(),
        output_splits=rank_QP[groups.etp_rank].tolist(),
        gather_splits=rank_QP.sum(1).tolist(),
        tokens_per_expert=counts_QPL.sum((0, 1)).tolist(),
        order=order,
    )


def _chunk_order(counts_CL: Tensor) -> tuple[Tensor, Tensor]:
    """Rows come in chunks by (source, expert); gives the order by (expert, source) and its inverse."""
    counts = counts_CL.t().reshape(-1)
    starts = (counts_CL.reshape(-1).cumsum(0) - counts_CL.reshape(-1)).view_as(counts_CL).t().reshape(-1)
    total = int(counts.sum())
    place = torch.arange(total)
    shift = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts, output_size=total)
    rows = place + shift
    inverse = torch.empty_like(rows)
    inverse[rows] = place
    return rows, inverse

"""What one dispatch decides and its combine must know: row order, split sizes, rows of each local expert.

T tokens, E experts, L local experts, P expert-parallel ranks, Q expert-tensor-parallel ranks, N rows of this
rank before dispatch, R rows after it. Received rows come by (tp rank, source rank, local expert); experts want them by
(local expert, tp rank, source rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import collective
from fluid_npu.device.kernels.groups import GroupRows
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
    tokens_per_expert: GroupRows
    """[L] rows of each local expert."""
    order: tuple[Tensor, Tensor] | None
    """[R] which received row comes at each place of the experts' order, and the inverse; None when in order already."""


def exchange_counts(counts_E: Tensor, groups: ExpertGroups) -> Any:
    """Starts telling the other ranks how many rows they get; returns what ``finish_counts`` takes."""
    if groups.etp_size > 1:
        received = counts_E.new_empty(groups.etp_size * groups.ep_size * counts_E.shape[0])
        work = dist.all_gather_into_tensor(received, counts_E, group=groups.tp_ep.group, async_op=True)
    else:
        received = torch.empty_like(counts_E)
        work = dist.all_to_all_single(received, counts_E, group=groups.ep.group, async_op=True)
    return received, work


@dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """The process groups that a dispatch moves rows in, and this rank's place."""

    ep: Peers
    etp: Peers
    tp_ep: Peers

    @property
    def ep_size(self) -> int:
        """P."""
        return len(self.ep.ranks)

    @property
    def etp_size(self) -> int:
        """Q."""
        return len(self.etp.ranks)

    @property
    def ep_rank(self) -> int:
        """This rank's place in the expert-parallel group."""
        return self.ep.index

    @property
    def etp_rank(self) -> int:
        """This rank's place in the expert-tensor-parallel group."""
        return self.etp.index

    @property
    def alone(self) -> bool:
        """Whether no other rank holds or shares experts."""
        return self.ep_size * self.etp_size == 1


def finish_counts(pending: Any, groups: ExpertGroups, local_experts: int, name: str) -> tuple[Tensor, Tensor]:
    """``[Q, P, L]`` on the device and on the host: rows from each (tp rank, source rank) for each local expert."""
    received, work = pending
    with collective(f"token counts of {name}", groups.tp_ep.ranks):
        work.wait()
        host = received.cpu()
    return _by_source(received, groups, local_experts), _by_source(host, groups, local_experts)


def _by_source(received: Tensor, groups: ExpertGroups, local_experts: int) -> Tensor:
    if groups.etp_size == 1:
        return received.view(1, groups.ep_size, local_experts)
    by_rank = received.view(groups.ep_size, groups.etp_size, groups.ep_size, local_experts)
    return by_rank[:, :, groups.ep_rank].transpose(0, 1)


def make_plan(
    layout: PermuteLayout,
    tokens_shape: torch.Size,
    counts_E: Tensor,
    counts_QPL: Tensor,
    on_device_QPL: Tensor,
    groups: ExpertGroups,
) -> DispatchPlan:
    """The plan for these counts. ``counts_E``: rows of this rank per expert; both counts are on the host."""
    by_source = counts_QPL.numpy()
    _, ep_size, local_experts = by_source.shape
    order = None
    if local_experts > 1 and not groups.alone:
        device = layout.token_of_row.device
        rows, inverse = _chunk_order(by_source.reshape(-1, local_experts))
        order = torch.from_numpy(rows).to(device), torch.from_numpy(inverse).to(device)
    from_rank = by_source.sum(2)
    return DispatchPlan(
        layout=layout,
        tokens_shape=tokens_shape,
        input_splits=counts_E.numpy().reshape(ep_size, local_experts).sum(1).tolist(),
        output_splits=from_rank[groups.etp_rank].tolist(),
        gather_splits=from_rank.sum(1).tolist(),
        tokens_per_expert=GroupRows(by_source.sum((0, 1)).tolist(), on_device_QPL.sum((0, 1))),
        order=order,
    )


def _chunk_order(counts_CL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows come in chunks by (source, expert); gives the order by (expert, source) and its inverse."""
    counts = counts_CL.T.reshape(-1)
    ends = counts_CL.cumsum().reshape(counts_CL.shape)
    starts = (ends - counts_CL).T.reshape(-1)
    place = np.arange(counts.sum())
    rows = place + np.repeat(starts - (counts.cumsum() - counts), counts)
    inverse = np.empty_like(rows)
    inverse[rows] = place
    return rows, inverse

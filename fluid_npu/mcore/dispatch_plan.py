"""What one dispatch decides and its combine must know: row order, split sizes, rows of each local expert.

T tokens, E experts, L local experts, P expert-parallel ranks, Q expert-tensor-parallel ranks, N rows of this
rank before dispatch, R rows of its experts. Plain rows arrive by (tp rank, source rank, local expert), those of a token
sent once by (tp rank, source rank, token); experts want them by (local expert, tp rank, source rank, token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import collective
from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.groups import DeviceRows, GroupRows
from fluid_npu.mcore.dispatch_rows import OnceRows, PlainRows, RowForm, StaticRows
from fluid_npu.ops.once import OnceLayout
from fluid_npu.ops.payload_once import Arrival
from fluid_npu.ops.payload_static import StaticArrival
from fluid_npu.ops.permute import PermuteLayout


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Everything that the steps after routing share. Index tensors are int64 on the tokens' device."""

    rows: RowForm
    tokens_shape: torch.Size
    input_splits: list[int]
    """[P] rows sent to each expert-parallel rank."""
    output_splits: list[int]
    """[P] rows received from each, before any gather over the expert-tensor-parallel group."""
    gather_splits: list[int]
    """[Q] rows that each expert-tensor-parallel rank contributes; one entry without expert tensor parallelism."""
    tokens_per_expert: GroupRows | DeviceRows
    """[L] rows of each local expert, perhaps known to the device alone, once they have arrived."""
    plain: PlainCounts | None = None
    """What the plain form would move; None when this is the plain form."""
    table: list[list[int]] | None = None
    """[P, P] rows from each expert-parallel rank to each, where every rank was told them."""
    inside: InsideLeg | None = None
    """Where rows that came to this node go on to; None when they are where they belong."""


@dataclass(frozen=True, kw_only=True)
class InsideLeg:
    """The second exchange of a dispatch by nodes (``mcore.node_plan``): as the splits and the table of the first."""

    input_splits: list[int]
    output_splits: list[int]
    table: list[list[int]] | None


@dataclass(frozen=True, kw_only=True)
class PlainCounts:
    """Rows of (token, expert) to and from other ranks, to compare bytes with."""

    sent: int
    received: int
    gathered_sent: int
    gathered_received: int
    """Between expert-tensor-parallel ranks."""
    across: tuple[int, int] = (0, 0)
    """Of those sent and received, to and from other nodes, where a dispatch goes by nodes."""

    @staticmethod
    def of_even_routing(pairs: int, ranks: int) -> PlainCounts:
        """Of a rank with so many (token, expert), where the host knows no other routing."""
        to_others = pairs * (ranks - 1) // ranks
        return PlainCounts(sent=to_others, received=to_others, gathered_sent=0, gathered_received=0)

    def bytes(self, row_bytes: int) -> tuple[int, int]:
        """Sent and received by a dispatch with rows of that many bytes."""
        return self.sent * row_bytes, self.received * row_bytes

    def gathered_bytes(self, row_bytes: int) -> tuple[int, int]:
        """The same between expert-tensor-parallel ranks."""
        return self.gathered_sent * row_bytes, self.gathered_received * row_bytes


def exchange_counts(counts_E: Tensor, groups: ExpertGroups, everyone: bool = False) -> Any:
    """Starts telling the other ranks how many rows they get; returns what ``finish_counts`` takes.

    As many numbers for each rank: rows of each of its experts and, where tokens are sent once, before them its rows.
    ``everyone``: each rank is told what all others get too, for transports that write into another rank's memory.
    """
    if everyone or groups.etp_size > 1:
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


@dataclass(frozen=True, kw_only=True)
class ToldCounts:
    """What each (tp rank, source rank) told this rank: ``[Q, P, numbers]`` on the device and on the host.

    ``all_PPC``: on the host, what each expert-parallel rank told each, where every rank was told.
    """

    on_device: Tensor
    host: Tensor
    all_PPC: Tensor | None
    own: Tensor | None = None
    """On the host, ``[P, numbers]``: what this rank told each, where every rank was told."""

    def table(self, columns: slice = slice(None)) -> list[list[int]] | None:
        """Rows from each rank to each: the sum over these numbers."""
        return None if self.all_PPC is None else self.all_PPC[:, :, columns].sum(2).tolist()


def finish_counts(pending: Any, groups: ExpertGroups, numbers: int, name: str) -> ToldCounts:
    """Waits for the counts. ``numbers``: for each rank."""
    received, work = pending
    with collective(f"token counts of {name}", groups.tp_ep.ranks):
        work.wait()
        host = received.cpu()
    if host.numel() == groups.ep_size * numbers and groups.ep_size * groups.etp_size > 1:
        shape = (1, groups.ep_size, numbers)
        return ToldCounts(on_device=received.view(shape), host=host.view(shape), all_PPC=None)
    shape_of_all = (groups.ep_size, groups.etp_size, groups.ep_size, numbers)
    by_rank, host_by_rank = received.view(shape_of_all), host.view(shape_of_all)
    return ToldCounts(
        on_device=by_rank[:, :, groups.ep_rank].transpose(0, 1),
        host=host_by_rank[:, :, groups.ep_rank].transpose(0, 1),
        all_PPC=host_by_rank[:, groups.etp_rank],
        own=host_by_rank[groups.ep_rank, groups.etp_rank],
    )


def make_plan(
    layout: PermuteLayout,
    tokens_shape: torch.Size,
    counts_E: Tensor,
    counts_QPL: Tensor,
    on_device_QPL: Tensor,
    groups: ExpertGroups,
    table: list[list[int]] | None = None,
) -> DispatchPlan:
    """The plan for these counts. ``counts_E``: rows of this rank per expert; both counts are on the host."""
    by_source = counts_QPL.numpy()
    _, ep_size, local_experts = by_source.shape
    order, ends = None, None
    if local_experts > 1 and not groups.alone:
        chunks = on_device_QPL.reshape(-1, local_experts)
        rows, inverse, ends = kernels_of(chunks).chunk_order(chunks, counts_QPL.reshape(-1, local_experts))
        order = rows, inverse
    on_device = on_device_QPL.sum((0, 1)) if ends is None else None
    from_rank = by_source.sum(2)
    return DispatchPlan(
        rows=PlainRows(layout=layout, order=order),
        tokens_shape=tokens_shape,
        input_splits=counts_E.numpy().reshape(ep_size, local_experts).sum(1).tolist(),
        output_splits=from_rank[groups.etp_rank].tolist(),
        gather_splits=from_rank.sum(1).tolist(),
        tokens_per_expert=GroupRows(by_source.sum((0, 1)).tolist(), on_device, ends),
        table=table,
    )


def make_once_plan(
    layout: OnceLayout,
    tokens_shape: torch.Size,
    sent_PC: Tensor,
    told: ToldCounts,
    groups: ExpertGroups,
) -> DispatchPlan:
    """The plan of a dispatch that sends a token once to each rank; C is 1 + L: rows, then rows of each local expert.

    ``sent_PC``: of this rank to each, on the host; ``told``: of each to this rank.
    """
    counts_QPC, on_device_QPC = told.host, told.on_device
    here, rows_QP = groups.etp_rank, counts_QPC[:, :, 0]
    experts_L = counts_QPC[:, :, 1:].sum((0, 1))
    pairs_Q = counts_QPC[:, :, 1:].sum((1, 2))
    sent_P, received_P = sent_PC[:, 1:].sum(1), counts_QPC[here, :, 1:].sum(1)
    return DispatchPlan(
        rows=OnceRows(layout=layout, arrival=Arrival(expert_rows=int(experts_L.sum()))),
        tokens_shape=tokens_shape,
        input_splits=sent_PC[:, 0].tolist(),
        output_splits=rows_QP[here].tolist(),
        gather_splits=rows_QP.sum(1).tolist(),
        tokens_per_expert=GroupRows(experts_L.tolist(), on_device_QPC[:, :, 1:].sum((0, 1))),
        plain=PlainCounts(
            sent=int(sent_P.sum() - sent_P[groups.ep_rank]),
            received=int(received_P.sum() - received_P[groups.ep_rank]),
            gathered_sent=int(pairs_Q[here]) * (groups.etp_size - 1),
            gathered_received=int(pairs_Q.sum() - pairs_Q[here]),
        ),
        table=told.table(slice(0, 1)),
    )


def first_tokens(routing_map_TE: Tensor, most: int) -> Tensor:
    """The routing map with so many tokens of each expert at most, the first ones; no rank waits for a number."""
    return routing_map_TE & (routing_map_TE.cumsum(0, dtype=torch.int32) <= most)


def make_static_plan(
    layout: OnceLayout, tokens_shape: torch.Size, groups: ExpertGroups, most: int | None = None
) -> DispatchPlan:
    """The plan of a dispatch that sends every token to every rank: sizes follow from shapes alone.

    ``most``: tokens that a rank sends to an expert at most; it bounds the room for the experts' rows, which otherwise
    is that of all tokens in all their slots. The plain form's bytes are those of even routing, since nobody on the host
    knows the routing.
    """
    tokens, ranks = layout.rows.num_tokens, groups.ep_size
    pairs, splits = tokens * layout.topk, [tokens] * ranks
    room = tokens * ranks * layout.num_slots
    if most is not None:
        room = min(room, ranks * layout.local * most)
    experts = DeviceRows(layout.local, capacity=room, expected=min(pairs, room))
    return DispatchPlan(
        rows=StaticRows(layout=layout, arrival=StaticArrival(experts=experts)),
        tokens_shape=tokens_shape,
        input_splits=splits,
        output_splits=splits,
        gather_splits=[tokens * ranks],
        tokens_per_expert=experts,
        plain=PlainCounts.of_even_routing(pairs, ranks),
        table=[splits] * ranks,
    )

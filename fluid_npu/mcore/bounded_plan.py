"""Plans of a dispatch that sends a token once to each rank, in blocks of rows that were agreed on beforehand.

All sizes follow from those blocks, so that a layer can be recorded as a whole; as with rows that go to every rank,
which rows the experts have is found on the device (``ops.payload_static``), in buffers of a size that was agreed on
too: room for all received rows in all their slots is several times what is used. Rows, their order and all sums are
those of the same dispatch with sizes that are told (``make_once_plan``, ``make_once_chunked_plan``): the filling
behind a block's rows is computed by nobody. Bytes to compare with are those of even routing: the host does not know
another.

P ranks, C chunks, T tokens; no expert tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.device.kernels.pieces import PieceRows
from fluid_npu.mcore.agreed_room import AgreedRows
from fluid_npu.mcore.chunk_cuts import ChunkCut, share_experts
from fluid_npu.mcore.chunk_plan import ChunkedPlan, ChunkPlan
from fluid_npu.mcore.dispatch_plan import DispatchPlan, ExpertGroups, PlainCounts
from fluid_npu.mcore.dispatch_rows import StaticRows
from fluid_npu.ops.once import OnceLayout
from fluid_npu.ops.once_bounded import bounded_groups
from fluid_npu.ops.payload_static import StaticArrival


def make_bounded_plan(
    map_TE: Tensor, topk: int, tokens_shape: torch.Size, groups: ExpertGroups, agreed: AgreedRows
) -> tuple[DispatchPlan, Tensor]:
    """(The plan for a bool map, of one chunk; what ranks are told, int32 [1, 1 + P]: ``bounded_groups``)."""
    ranks, pairs, (table,), (room,) = groups.ep_size, map_TE.shape[0] * topk, agreed.rows, agreed.pairs
    sent, received = table[groups.ep_rank], [from_rank[groups.ep_rank] for from_rank in table]
    layout, told = bounded_groups(map_TE, topk, sent)
    sends = _sends(layout, sum(received), room, pairs)
    plan = DispatchPlan(
        rows=sends,
        tokens_shape=tokens_shape,
        input_splits=sent,
        output_splits=received,
        gather_splits=[sum(received)],
        tokens_per_expert=sends.arrival.experts,
        plain=PlainCounts.of_even_routing(pairs, ranks),
        table=table,
    )
    return plan, told.unsqueeze(0)


def make_bounded_chunked_plan(
    map_TE: Tensor,
    topk: int,
    cuts: Sequence[ChunkCut],
    tokens_shape: torch.Size,
    groups: ExpertGroups,
    agreed: AgreedRows,
) -> tuple[ChunkedPlan, Tensor]:
    """(The plan; what ranks are told of each chunk, int32 [C, 1 + P]: ``bounded_groups``).

    Args:
        map_TE: bool.
        topk: K.
        cuts: what is in each chunk.
        tokens_shape: of the layer's input.
        groups: the ranks.
        agreed: of each chunk.
    """
    ranks, own = groups.ep_size, groups.ep_rank
    told = torch.empty(len(cuts), 1 + ranks, dtype=torch.int32, device=map_TE.device)
    plans, arriving, start = [], [], 0
    for cut, rows_PP, of_experts, told_N in zip(cuts, agreed.rows, agreed.pairs, told, strict=True):
        table = [
            [rows if cut.sends_to(target, source) else 0 for target, rows in enumerate(from_rank)]
            for source, from_rank in enumerate(rows_PP)
        ]
        room = [rows if cut.sends_to(target, own) else None for target, rows in enumerate(rows_PP[own])]
        layout, _ = bounded_groups(cut.columns(map_TE), topk, room, told=told_N)
        sent, received = table[own], [from_rank[own] for from_rank in table]
        pairs = cut.num_tokens * topk * cut.num_experts // cut.local
        share = 1.0 if cut.here is None else 1 / ranks if cut.here else 1 - 1 / ranks
        sends = _sends(layout, sum(received), of_experts, ceil(pairs * share))
        arriving.append(sends.arrival.experts.among(cut.experts.start, cut.local))
        plans.append(
            ChunkPlan(
                rows=slice(start, start + sum(sent)),
                experts=cut.experts,
                sends=sends,
                input_splits=[] if cut.here else sent,
                output_splits=[] if cut.here else received,
                tokens_per_expert=sends.arrival.experts,
                table=None if cut.here else table,
                plain=None if cut.here else PlainCounts.of_even_routing(pairs, ranks),
                cut=cut,
                here=bool(cut.here),
            )
        )
        start += sum(sent)
    shared = PieceRows(arriving) if share_experts(cuts) else None
    plan = ChunkedPlan(tokens_shape=tokens_shape, whole=None, chunks=plans, shared=shared, ranks=ranks)
    return plan, told


def _sends(layout: OnceLayout, received: int, agreed: int, expected: int) -> StaticRows:
    """For so many received rows, of which the experts have as many as were ``agreed`` on, or all that there can be."""
    room = min(agreed, received * layout.num_slots)
    experts = DeviceRows(layout.local, capacity=room, expected=min(expected, room))
    return StaticRows(layout=layout, arrival=StaticArrival(experts=experts))

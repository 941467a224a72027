"""Plans of a dispatch that sends a token once to each rank, in blocks of rows that were agreed on beforehand.

All sizes follow from those blocks, so that a layer can be recorded as a whole; as with rows that go to every rank,
which rows the experts have is found on the device (``ops.payload_static``), in buffers of a size that was agreed on
too: room for all received rows in all their slots is several times what is used. Rows, their order and all sums are
those of the same dispatch with sizes that are told (``make_once_plan``, ``make_token_chunked_plan``): the filling
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
    ranks, pairs, (rows,), (room,) = groups.ep_size, map_TE.shape[0] * topk, agreed.rows, agreed.pairs
    layout, told = bounded_groups(map_TE, topk, [rows] * ranks)
    sends, splits = _sends(layout, ranks * rows, room, pairs), [rows] * ranks
    plan = DispatchPlan(
        rows=sends,
        tokens_shape=tokens_shape,
        input_splits=splits,
        output_splits=splits,
        gather_splits=[ranks * rows],
        tokens_per_expert=sends.arrival.experts,
        plain=PlainCounts.of_even_routing(pairs, ranks),
        table=[splits] * ranks,
    )
    return plan, told.unsqueeze(0)


def make_bounded_chunked_plan(
    maps: Sequence[Tensor],
    topk: int,
    tokens: Sequence[slice],
    tokens_shape: torch.Size,
    groups: ExpertGroups,
    agreed: AgreedRows,
    own_first: bool,
) -> tuple[ChunkedPlan, Tensor]:
    """(The plan; what ranks are told of each chunk, int32 [C, 1 + P]: ``bounded_groups``).

    Args:
        maps: bool, of each chunk's tokens; with ``own_first`` too, for all ranks.
        topk: K.
        tokens: each chunk's, of the T tokens.
        tokens_shape: of the layer's input.
        groups: the ranks.
        agreed: of each chunk.
        own_first: the first chunk's rows are those that stay on this rank, and no other's do.
    """
    ranks, own = groups.ep_size, groups.ep_rank
    told = torch.empty(len(maps), 1 + ranks, dtype=torch.int32, device=maps[0].device)
    plans, start = [], 0
    chunks = zip(maps, tokens, agreed.rows, agreed.pairs, strict=True)
    for number, (map_TE, mine, each, of_experts) in enumerate(chunks):
        here = own_first and number == 0
        # [P, P]: to each rank from each, and of the rows that stay here where the others' are not.
        table = [[each if here == (s == t) or not own_first else 0 for t in range(ranks)] for s in range(ranks)]
        room = [each if here == (rank == own) or not own_first else None for rank in range(ranks)]
        layout, _ = bounded_groups(map_TE, topk, room, told=told[number])
        pairs, received = map_TE.shape[0] * topk, sum(table[own])
        share = 1.0 if not own_first else 1 / ranks if here else 1 - 1 / ranks
        sends = _sends(layout, received, of_experts, ceil(pairs * share))
        plans.append(
            ChunkPlan(
                rows=slice(start, start + received),
                experts=slice(0, layout.local),
                sends=sends,
                input_splits=[] if here else table[own],
                output_splits=[] if here else table[own],
                tokens_per_expert=sends.arrival.experts,
                table=None if here else table,
                plain=None if here else PlainCounts.of_even_routing(pairs, ranks),
                tokens=None if here else mine,
                here=here,
            )
        )
        start += received
    shared = PieceRows([plan.tokens_per_expert for plan in plans])
    return ChunkedPlan(tokens_shape=tokens_shape, whole=None, chunks=plans, shared=shared), told


def _sends(layout: OnceLayout, received: int, agreed: int, expected: int) -> StaticRows:
    """For so many received rows, of which the experts have as many as were ``agreed`` on, or all that there can be."""
    room = min(agreed, received * layout.num_slots)
    experts = DeviceRows(layout.local, capacity=room, expected=min(expected, room))
    return StaticRows(layout=layout, arrival=StaticArrival(experts=experts))

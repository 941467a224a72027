"""The plan of a dispatch that sends every token to every rank, the rows that stay here as a chunk before the others.

All sizes follow from shapes, so nobody waits for a number and a layer can be recorded as a whole. Which rows the
experts have is found on the device, for each chunk by itself, in buffers with room for the most that there can be. Sums
over a token's ranks run in rank order, as in one piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.device.kernels.pieces import PieceRows
from fluid_npu.mcore.chunk_plan import ChunkedPlan, ChunkPlan
from fluid_npu.mcore.dispatch_plan import ExpertGroups, PlainCounts
from fluid_npu.mcore.dispatch_rows import StaticRows
from fluid_npu.ops.once import every_group, rows_of_layout
from fluid_npu.ops.payload_static import StaticArrival


def make_static_own_first(map_TE: Tensor, topk: int, tokens_shape: torch.Size, groups: ExpertGroups) -> ChunkedPlan:
    """The plan for a bool map, without expert tensor parallelism; bytes to compare with are those of even routing."""
    tokens, ranks, own = map_TE.shape[0], groups.ep_size, groups.ep_rank
    layout = every_group(map_TE, topk, ranks, first=own)
    pairs = tokens * topk
    here, there = (
        StaticRows(
            layout=rows_of_layout(layout, rows),
            arrival=StaticArrival(
                experts=DeviceRows(layout.local, (rows.stop - rows.start) * layout.num_slots, expected)
            ),
        )
        for rows, expected in (
            (slice(0, tokens), -(-pairs // ranks)),
            (slice(tokens, tokens * ranks), -(-pairs * (ranks - 1) // ranks)),
        )
    )
    splits = [0 if rank == own else tokens for rank in range(ranks)]
    experts = slice(0, layout.local)
    first = ChunkPlan(
        rows=slice(0, tokens),
        experts=experts,
        sends=here,
        input_splits=[],
        output_splits=[],
        tokens_per_expert=here.arrival.experts,
        table=None,
        here=True,
    )
    others = ChunkPlan(
        rows=slice(tokens, tokens * ranks),
        experts=experts,
        sends=there,
        input_splits=splits,
        output_splits=splits,
        tokens_per_expert=there.arrival.experts,
        table=[[0 if source == target else tokens for target in range(ranks)] for source in range(ranks)],
        plain=PlainCounts.of_even_routing(pairs, ranks),
    )
    whole = StaticRows(layout=layout, arrival=there.arrival)
    shared = PieceRows([first.tokens_per_expert, others.tokens_per_expert])
    return ChunkedPlan(tokens_shape=tokens_shape, whole=whole, chunks=[first, others], shared=shared)

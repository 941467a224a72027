"""The plan of a dispatch in chunks of tokens: chunk c moves the c-th range of every rank's tokens, once to each rank.

For rows that are sent once for each (token, rank). A chunk of experts would send a token once for each chunk that has
one of its experts: with 64 experts, top-6 and two chunks 1.69 times the rows over 2 ranks, 1.36 over 4, 1.17 over 8. A
chunk of tokens sends the rows that one piece sends, whatever the routing, and a hot expert's rows come in all chunks
instead of making one of them long. The price is that each chunk reads all weights, and that where no kernel reads rows
in pieces those of all chunks are put together for dW (``kernels.pieces``): both are traffic of the device's own memory,
which is some ten times as fast as NVLink and more than fifty times as fast as a network. A plain dispatch gains nothing
from it, and keeps chunks of experts.

With local rows first, rows for the rank itself, of all tokens, are a chunk before these and are not exchanged.

C chunks, L local experts, N numbers that a rank is told of a chunk: its rows, then the rows of each local expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.device.kernels.pieces import PieceRows
from fluid_npu.mcore.chunk_plan import ChunkedPlan, ChunkPlan
from fluid_npu.mcore.dispatch_plan import DispatchPlan, ExpertGroups, ToldCounts, make_once_plan
from fluid_npu.ops.once import OnceLayout


def make_token_chunked_plan(
    layouts: Sequence[OnceLayout],
    tokens: Sequence[slice],
    tokens_shape: torch.Size,
    sent_PCN: Tensor,
    told: ToldCounts,
    groups: ExpertGroups,
    own_first: bool = False,
) -> ChunkedPlan:
    """The plan for these counts.

    Args:
        layouts: of each chunk's rows.
        tokens: each chunk's, of the T tokens.
        tokens_shape: of the layer's input.
        sent_PCN: of this rank to each, on the host.
        told: of each to this rank; C * N numbers each.
        groups: without expert tensor parallelism.
        own_first: the first chunk's rows are those that stay on this rank, and no other's do.
    """
    chunks: list[ChunkPlan] = []
    start = 0
    for number, (layout, mine) in enumerate(zip(layouts, tokens, strict=True)):
        plan = make_once_plan(layout, tokens_shape, sent_PCN[:, number], _of_chunk(told, number, len(tokens)), groups)
        rows = slice(start, start + sum(plan.input_splits))
        chunks.append(_chunk(plan, rows, mine, here=own_first and number == 0))
        start = rows.stop
    counts_CL = _of_all(told.on_device, len(tokens))[:, :, :, 1:].sum((0, 1))
    shared = PieceRows([chunk.tokens_per_expert for chunk in chunks], counts_CL)
    return ChunkedPlan(tokens_shape=tokens_shape, layout=None, chunks=chunks, shared=shared)


def _chunk(plan: DispatchPlan, rows: slice, tokens: slice, here: bool) -> ChunkPlan:
    assert isinstance(plan.tokens_per_expert, GroupRows), "only dispatch='static' leaves them on the device"
    return ChunkPlan(
        rows=rows,
        experts=slice(0, len(plan.tokens_per_expert)),
        sends=plan.rows,
        input_splits=plan.input_splits,
        output_splits=plan.output_splits,
        tokens_per_expert=plan.tokens_per_expert,
        table=plan.table,
        plain=plan.plain,
        tokens=None if here else tokens,
        here=here,
    )


def _of_all(counts: Tensor, chunks: int) -> Tensor:
    """``[..., C * N]`` as ``[..., C, N]``."""
    return counts.unflatten(-1, (chunks, -1))


def _of_chunk(told: ToldCounts, number: int, chunks: int) -> ToldCounts:
    """What was told of one chunk."""
    on_device, host = (_of_all(counts, chunks)[:, :, number] for counts in (told.on_device, told.host))
    everyone = None if told.all_PPC is None else _of_all(told.all_PPC, chunks)[:, :, number]
    return ToldCounts(on_device=on_device, host=host, all_PPC=everyone)

"""The plan of a dispatch in chunks that sends a token once to each rank, from counts that ranks told each other.

A chunk is a range of every rank's tokens or a group of every rank's experts (``chunk_cuts``). A chunk of experts sends
a token once for each chunk that has one of its experts: with 64 experts, top-6 and two chunks 1.69 times the rows over
2 ranks, 1.36 over 4, 1.17 over 8; for Mixtral over 4 ranks 1.08. A chunk of tokens sends the rows that one piece sends,
whatever the routing, and a hot expert's rows come in all chunks instead of making one of them long. Its price is that
each chunk reads all weights, and that dW is of rows in one more piece for each chunk, which are read where they lie or,
where no kernel does that, put together (``kernels.pieces``). ``chunk_choice`` decides between them. A plain dispatch
gains nothing from chunks of tokens.

With local rows first, rows for the rank itself, of all tokens, are a chunk before these and are not exchanged.

C chunks, L local experts; of each chunk N numbers that a rank is told: its rows, then the rows of each of its experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.device.kernels.pieces import PieceRows
from fluid_npu.mcore.chunk_cuts import ChunkCut, share_experts
from fluid_npu.mcore.chunk_plan import ChunkedPlan, ChunkPlan
from fluid_npu.mcore.dispatch_plan import ExpertGroups, PlainCounts, ToldCounts
from fluid_npu.mcore.dispatch_rows import OnceRows
from fluid_npu.ops.once import OnceLayout
from fluid_npu.ops.payload_once import Arrival


def make_once_chunked_plan(
    layouts: Sequence[OnceLayout],
    cuts: Sequence[ChunkCut],
    tokens_shape: torch.Size,
    sent_PCN: Tensor,
    told: ToldCounts,
    groups: ExpertGroups,
) -> ChunkedPlan:
    """The plan for these counts.

    Args:
        layouts: of each chunk's rows.
        cuts: what is in each.
        tokens_shape: of the layer's input.
        sent_PCN: of this rank to each, on the host.
        told: of each to this rank; C * N numbers each.
        groups: without expert tensor parallelism.
    """
    chunks = len(cuts)
    sent_PC, received_PCN = sent_PCN.numpy(), _of_all(told.host, chunks)[0].numpy()
    all_PPC = None if told.all_PPC is None else _of_all(told.all_PPC, chunks)[:, :, :, 0].numpy()
    counts_CL = _of_all(told.on_device, chunks)[0, :, :, 1:].sum(0)
    ends_CL = counts_CL.cumsum(1, dtype=torch.int32)
    plans: list[ChunkPlan] = []
    among_all: list[GroupRows] = []
    start = 0
    for number, (layout, cut) in enumerate(zip(layouts, cuts, strict=True)):
        sent_PN, received_PN = sent_PC[:, number], received_PCN[:, number]
        rows = slice(start, start + int(sent_PN[:, 0].sum()))
        among_all.append(GroupRows(received_PN[:, 1:].sum(0).tolist(), counts_CL[number], ends_CL[number]))
        # Experts of other chunks have no rows here, so that where its own end is right among all and alone.
        mine = cut.experts
        experts = GroupRows(among_all[-1][mine], counts_CL[number, mine], ends_CL[number, mine])
        plans.append(
            ChunkPlan(
                rows=rows,
                experts=mine,
                sends=OnceRows(layout=layout, arrival=Arrival(expert_rows=sum(experts))),
                input_splits=sent_PN[:, 0].tolist(),
                output_splits=received_PN[:, 0].tolist(),
                tokens_per_expert=experts,
                table=None if all_PPC is None else all_PPC[:, :, number].tolist(),
                plain=_plain(sent_PN, received_PN, groups.ep_rank),
                cut=cut,
                here=bool(cut.here),
            )
        )
        start = rows.stop
    shared = PieceRows(among_all, counts_CL) if share_experts(cuts) else None
    return ChunkedPlan(tokens_shape=tokens_shape, whole=None, chunks=plans, shared=shared, ranks=groups.ep_size)


def counts_of_chunks(counts: Sequence[Tensor], cuts: Sequence[ChunkCut]) -> Tensor:
    """``[P, C, N]`` from what each chunk tells of its own experts; experts that a chunk has not have no rows there."""
    if all(cut.whole for cut in cuts):
        return torch.stack(list(counts), dim=1)
    whole = counts[0].new_zeros(counts[0].shape[0], len(cuts), 1 + cuts[0].local)
    for number, (of_chunk, cut) in enumerate(zip(counts, cuts, strict=True)):
        whole[:, number, 0] = of_chunk[:, 0]
        whole[:, number, 1 + cut.experts.start : 1 + cut.experts.stop] = of_chunk[:, 1:]
    return whole


def _plain(sent_PN: np.ndarray, received_PN: np.ndarray, own: int) -> PlainCounts:
    """Rows of (token, expert) to and from others."""
    sent, received = (int(each[:, 1:].sum() - each[own, 1:].sum()) for each in (sent_PN, received_PN))
    return PlainCounts(sent=sent, received=received, gathered_sent=0, gathered_received=0)


def _of_all(counts: Tensor, chunks: int) -> Tensor:
    """``[..., C * N]`` as ``[..., C, N]``."""
    return counts.unflatten(-1, (chunks, -1))

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

import numpy as np
import torch
from torch import Tensor

from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.device.kernels.pieces import PieceRows
from fluid_npu.mcore.chunk_plan import ChunkedPlan, ChunkPlan
from fluid_npu.mcore.dispatch_plan import ExpertGroups, PlainCounts, ToldCounts
from fluid_npu.mcore.dispatch_rows import OnceRows
from fluid_npu.ops.once import OnceLayout
from fluid_npu.ops.payload_once import Arrival


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
    chunks = len(tokens)
    sent_PC, received_PCN = sent_PCN.numpy(), _of_all(told.host, chunks)[0].numpy()
    all_PPC = None if told.all_PPC is None else _of_all(told.all_PPC, chunks)[:, :, :, 0].numpy()
    counts_CL = _of_all(told.on_device, chunks)[0, :, :, 1:].sum(0)
    ends_CL = counts_CL.cumsum(1, dtype=torch.int32)
    plans: list[ChunkPlan] = []
    start = 0
    for number, (layout, mine) in enumerate(zip(layouts, tokens, strict=True)):
        sent_PN, received_PN = sent_PC[:, number], received_PCN[:, number]
        rows, here = slice(start, start + int(sent_PN[:, 0].sum())), own_first and number == 0
        experts = GroupRows(received_PN[:, 1:].sum(0).tolist(), counts_CL[number], ends_CL[number])
        plans.append(
            ChunkPlan(
                rows=rows,
                experts=slice(0, len(experts)),
                sends=OnceRows(layout=layout, arrival=Arrival(expert_rows=sum(experts))),
                input_splits=sent_PN[:, 0].tolist(),
                output_splits=received_PN[:, 0].tolist(),
                tokens_per_expert=experts,
                table=None if all_PPC is None else all_PPC[:, :, number].tolist(),
                plain=_plain(sent_PN, received_PN, groups.ep_rank),
                tokens=None if here else mine,
                here=here,
            )
        )
        start = rows.stop
    shared = PieceRows([plan.tokens_per_expert for plan in plans], counts_CL)
    return ChunkedPlan(tokens_shape=tokens_shape, whole=None, chunks=plans, shared=shared)


def _plain(sent_PN: np.ndarray, received_PN: np.ndarray, own: int) -> PlainCounts:
    """Rows of (token, expert) to and from others."""
    sent, received = (int(each[:, 1:].sum() - each[own, 1:].sum()) for each in (sent_PN, received_PN))
    return PlainCounts(sent=sent, received=received, gathered_sent=0, gathered_received=0)


def _of_all(counts: Tensor, chunks: int) -> Tensor:
    """``[..., C * N]`` as ``[..., C, N]``."""
    return counts.unflatten(-1, (chunks, -1))

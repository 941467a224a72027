"""The plan of a dispatch in chunks: chunk c moves the rows of the c-th group of every rank's local experts.

All splits come from the one exchange of counts. T tokens, N rows of this rank before dispatch, R rows of its experts,
E experts, L local experts, P expert-parallel ranks; no expert tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fluid_npu.comm.all_to_all import Route
from fluid_npu.comm.transports import Table
from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.groups import GroupRows
from fluid_npu.mcore.dispatch_plan import ExpertGroups
from fluid_npu.mcore.dispatch_rows import PlainRows
from fluid_npu.ops.chunk_rows import chunk_of, experts_by_chunk, in_chunk_order
from fluid_npu.ops.permute import PermuteLayout


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """One chunk's part. Index tensors are int64 on the tokens' device."""

    rows: slice
    """Of this rank's N rows, by chunk."""
    experts: slice
    """Of the L local experts."""
    sends: PlainRows
    """Layout of its rows alone, and the order of its experts' rows."""
    input_splits: list[int]
    """[P] rows sent to each rank."""
    output_splits: list[int]
    """[P] rows received from each."""
    tokens_per_expert: GroupRows
    """Rows of each of its experts."""
    table: Table | None
    """[P, P] rows from each rank to each, where every rank was told them."""

    def route(self, groups: ExpertGroups, label: str, back: bool = False) -> Route:
        """Of its dispatch, or of its combine."""
        there = Route(
            peers=groups.ep,
            output_splits=self.output_splits,
            input_splits=self.input_splits,
            comm_type="moe_dispatch",
            label=label,
            table=self.table,
        )
        return there.reversed("moe_combine") if back else there


@dataclass(frozen=True, kw_only=True)
class ChunkedPlan:
    """Everything that the steps of a layer in chunks share."""

    tokens_shape: torch.Size
    layout: PermuteLayout
    """Of all rows, by chunk."""
    chunks: list[ChunkPlan]


def make_chunked_plan(
    layout: PermuteLayout,
    tokens_shape: torch.Size,
    counts_E: Tensor,
    counts_PL: Tensor,
    on_device: tuple[Tensor, Tensor],
    chunks: int,
    table: Callable[[slice], Table | None] = lambda experts: None,
) -> ChunkedPlan:
    """The plan for these counts.

    Args:
        layout: rows by expert.
        tokens_shape: of the layer's input.
        counts_E: rows of this rank for each expert, on the host.
        counts_PL: rows that each rank sends to each local expert, on the host.
        on_device: both counts on the tokens' device.
        chunks: a divisor of L.
        table: rows from each rank to each for some of its local experts, where every rank was told them; else None.
    """
    ranks, local = counts_PL.shape
    by_chunk_E = experts_by_chunk(len(counts_E), ranks, chunks, layout.token_of_row.device)
    whole = in_chunk_order(layout, on_device[0], by_chunk_E)
    sent, rows_L = counts_E.view(ranks, local), on_device[1].sum(0)
    size, start, plans = local // chunks, 0, []
    for number in range(chunks):
        experts = slice(number * size, (number + 1) * size)
        input_splits = sent[:, experts].sum(1).tolist()
        rows = slice(start, start + sum(input_splits))
        received = counts_PL[:, experts]
        order, ends = _order(received, on_device[1][:, experts])
        plans.append(
            ChunkPlan(
                rows=rows,
                experts=experts,
                sends=PlainRows(layout=chunk_of(whole, rows), order=order),
                input_splits=input_splits,
                output_splits=received.sum(1).tolist(),
                tokens_per_expert=GroupRows(received.sum(0).tolist(), rows_L[experts], ends),
                table=table(experts),
            )
        )
        start = rows.stop
    return ChunkedPlan(tokens_shape=tokens_shape, layout=whole, chunks=plans)


def _order(received_PL: Tensor, on_device_PL: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Of a chunk's received rows, by expert, None where they come so; and where each expert's end, if known."""
    if 1 in received_PL.shape:
        return None, None
    rows, inverse, ends = kernels_of(on_device_PL).chunk_order(on_device_PL, received_PL)
    return (rows, inverse), ends

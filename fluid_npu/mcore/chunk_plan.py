"""The plan of a dispatch in chunks of experts: chunk c moves the rows of the c-th group of every rank's local experts.

Plain rows only; ``token_chunk_plan`` says why. All splits come from the one exchange of counts. T tokens, N rows of
this rank before dispatch, R rows of its experts, E experts, L local experts, P expert-parallel ranks; no expert tensor
parallelism.
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
from fluid_npu.mcore.dispatch_plan import ExpertGroups, PlainCounts
from fluid_npu.mcore.dispatch_rows import PlainRows, RowForm
from fluid_npu.ops.chunk_rows import chunk_of, experts_by_chunk, in_chunk_order
from fluid_npu.ops.payload import Merge, Pack
from fluid_npu.ops.permute import PermuteLayout
from fluid_npu.schedule.joined_rows import JoinedRows


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """One chunk's part. Index tensors are int64 on the tokens' device."""

    rows: slice
    """Of this rank's N rows, by chunk."""
    experts: slice
    """Of the L local experts."""
    sends: RowForm
    """Its rows alone, and the order of its experts' rows."""
    input_splits: list[int]
    """[P] rows sent to each rank."""
    output_splits: list[int]
    """[P] rows received from each."""
    tokens_per_expert: GroupRows
    """Rows of each of its experts."""
    table: Table | None
    """[P, P] rows from each rank to each, where every rank was told them."""
    plain: PlainCounts | None = None
    """What the plain form would move; None when this is the plain form."""
    tokens: slice | None = None
    """Of the T tokens; None: its rows are of all."""

    def route(self, groups: ExpertGroups, label: str, row_bytes: int, back: bool = False) -> Route:
        """Of its dispatch, or of its combine; ``row_bytes`` of a row in plain form."""
        there = Route(
            peers=groups.ep,
            output_splits=self.output_splits,
            input_splits=self.input_splits,
            comm_type="moe_dispatch",
            label=label,
            plain_bytes=self.plain.bytes(row_bytes) if self.plain is not None else None,
            table=self.table,
        )
        return there.reversed("moe_combine") if back else there

    def pack(self, hidden: int, wire: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        """From all tokens and probabilities to the payload rows of this chunk."""
        load, mine = self.sends.pack(hidden, wire).load, self.tokens
        return load if mine is None else lambda x_TH, probs_TE: load(x_TH[mine], probs_TE[mine])

    def spread(self, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        """From the gradient of the layer's output, of ``shape``, to this chunk's rows."""
        load_grad, mine = self.sends.merge(shape).load_grad, self.tokens
        return load_grad if mine is None else lambda grad: load_grad(grad.reshape(-1, shape[-1])[mine])


@dataclass(frozen=True, kw_only=True)
class ChunkedPlan:
    """Everything that the steps of a layer in chunks share."""

    tokens_shape: torch.Size
    layout: PermuteLayout | None
    """Of all rows, by chunk; None where each chunk has tokens of its own."""
    chunks: list[ChunkPlan]
    joined: JoinedRows | None = None
    """The rows of all chunks by expert, where chunks share their experts."""

    def gather(self, hidden: int, wire: torch.dtype) -> Callable[[Tensor], tuple[Tensor | None, ...]]:
        """From the gradients of all N payload rows to those of tokens and probabilities."""
        if self.layout is not None:
            return Pack(self.layout, hidden, wire).unload_grad
        each = [(part.rows, part.sends.pack(hidden, wire)) for part in self.chunks]

        def gather(rows: Tensor) -> tuple[Tensor | None, ...]:
            grads = [pack.unload_grad(rows[mine]) for mine, pack in each]
            return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))

        return gather

    def merge(self) -> Callable[[Tensor], Tensor]:
        """From all N rows that came back to the sum of each token's."""
        shape = self.tokens_shape
        if self.layout is not None:
            whole = Merge(self.layout, shape)
            return lambda rows: whole.unload(rows)[0]
        each = [(part.rows, part.sends.merge(torch.Size((-1, shape[-1])))) for part in self.chunks]
        return lambda rows: torch.cat([merge.unload(rows[mine])[0] for mine, merge in each]).view(shape)


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

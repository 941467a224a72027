"""The plan of a dispatch in chunks of experts: chunk c moves the rows of the c-th group of every rank's local experts.

Plain rows only; for rows that are sent once per rank see ``once_chunk_plan``. All splits come from the one exchange of
counts. With local rows first the rows of this rank's own experts are a chunk before these, which nothing is exchanged
for, and dW is of its rows and the others'. T tokens, N rows of this rank before dispatch, R rows of its experts, E
experts, L local experts, P expert-parallel ranks; no expert tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluid_npu.comm.all_to_all import Route
from fluid_npu.comm.transports import Table
from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.groups import DeviceRows, GroupRows
from fluid_npu.device.kernels.pieces import PieceRows
from fluid_npu.mcore.chunk_cuts import ChunkCut, Joined
from fluid_npu.mcore.dispatch_plan import ExpertGroups, PlainCounts
from fluid_npu.mcore.dispatch_rows import PlainRows, RowForm
from fluid_npu.ops.chunk_rows import chunk_of, experts_by_chunk, experts_own_first, in_chunk_order
from fluid_npu.ops.permute import PermuteLayout


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
    tokens_per_expert: GroupRows | DeviceRows
    """Rows of each of its experts, perhaps known to the device alone, once they have arrived."""
    table: Table | None
    """[P, P] rows from each rank to each, where every rank was told them."""
    plain: PlainCounts | None = None
    """What the plain form would move; None when this is the plain form."""
    cut: ChunkCut | None = None
    """Which tokens and experts its rows are made of; None: all."""
    here: bool = False
    """Its rows stay on this rank: nothing is exchanged."""

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
        load, cut = self.sends.pack(hidden, wire).load, self.cut
        return load if cut is None else lambda x_TH, probs_TE: load(x_TH[cut.tokens], cut.columns(probs_TE))

    def spread(self, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        """From the gradient of the layer's output, of ``shape``, to this chunk's rows."""
        load_grad, cut = self.sends.merge(shape).load_grad, self.cut
        return load_grad if cut is None else lambda grad: load_grad(grad.reshape(-1, shape[-1])[cut.tokens])


@dataclass(frozen=True, kw_only=True)
class ChunkedPlan:
    """Everything that the steps of a layer in chunks share."""

    tokens_shape: torch.Size
    whole: RowForm | None
    """All rows, by chunk, to sum over them; None where each chunk's are summed first."""
    chunks: list[ChunkPlan]
    shared: PieceRows | None = None
    """The rows of all experts in each chunk, where chunks share their experts."""
    ranks: int = 1
    """P, for chunks of experts that are summed first."""

    @property
    def in_one(self) -> bool:
        """Whether sums are over all rows, which must lie in one buffer."""
        return self.whole is not None

    def gather(self, hidden: int, wire: torch.dtype) -> Callable[[Iterable[Tensor]], tuple[Tensor | None, ...]]:
        """From the gradients of payload rows, of each chunk or ``in_one``, to those of tokens and probabilities."""
        if self.whole is not None:
            unload = self.whole.pack(hidden, wire).unload_grad
            return lambda landed: unload(*landed)
        each = [part.sends.pack(hidden, wire) for part in self.chunks]

        def gather(landed: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
            tokens, probs = Joined(self._cuts), Joined(self._cuts, self.ranks)
            for pack, rows in zip(each, landed, strict=True):
                dx_TH, dprobs_TE = pack.unload_grad(rows)
                assert dx_TH is not None and dprobs_TE is not None, "rows sent once per rank have both"
                tokens.add(dx_TH)
                probs.add(dprobs_TE)
            return tokens.whole, probs.whole

        return gather

    def merge(self) -> Callable[[Iterable[Tensor]], Tensor]:
        """From the rows that came back, likewise, to the sum of each token's."""
        shape = self.tokens_shape
        if self.whole is not None:
            unload = self.whole.merge(shape).unload
            return lambda landed: unload(*landed)[0]
        each = [part.sends.merge(torch.Size((-1, shape[-1]))) for part in self.chunks]

        def merge(landed: Iterable[Tensor]) -> Tensor:
            tokens = Joined(self._cuts)
            for part, rows in zip(each, landed, strict=True):
                tokens.add(part.unload(rows)[0])
            return tokens.whole.view(shape)

        return merge

    @property
    def _cuts(self) -> list[ChunkCut]:
        """Of chunks that are summed first."""
        return [chunk.cut for chunk in self.chunks if chunk.cut is not None]


def make_chunked_plan(
    layout: PermuteLayout,
    tokens_shape: torch.Size,
    counts_E: Tensor,
    counts_PL: Tensor,
    on_device: tuple[Tensor, Tensor],
    chunks: int,
    table: Callable[[slice], Table | None] = lambda experts: None,
    own: int | None = None,
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
        own: this rank's place, if its own rows shall be a chunk before the others; None if not.
    """
    if own is not None:
        return _own_rows_first(layout, tokens_shape, counts_E, counts_PL, on_device, chunks, table, own)
    ranks, local = counts_PL.shape
    by_chunk_E = experts_by_chunk(len(counts_E), ranks, chunks, layout.token_of_row.device)
    whole = in_chunk_order(layout, on_device[0], by_chunk_E)
    plans = _chunks_of_experts(whole, 0, counts_E.view(ranks, local), counts_PL, on_device[1], chunks, table)
    return ChunkedPlan(tokens_shape=tokens_shape, whole=PlainRows(layout=whole, order=None), chunks=plans)


def _own_rows_first(
    layout: PermuteLayout,
    tokens_shape: torch.Size,
    counts_E: Tensor,
    counts_PL: Tensor,
    on_device: tuple[Tensor, Tensor],
    chunks: int,
    table: Callable[[slice], Table | None],
    own: int,
) -> ChunkedPlan:
    """As ``make_chunked_plan``, where the chunks of experts have the rows of other ranks alone."""
    ranks, local = counts_PL.shape
    order_E = experts_own_first(len(counts_E), ranks, chunks, own, layout.token_of_row.device)
    whole = in_chunk_order(layout, on_device[0], order_E)
    first = _own_chunk(whole, GroupRows(counts_PL[own].tolist(), on_device[1][own]))
    sent, received, received_there = (
        _without(counts, own) for counts in (counts_E.view(ranks, local), counts_PL, on_device[1])
    )
    start, table = first.rows.stop, _between_ranks(table)
    plans = [first, *_chunks_of_experts(whole, start, sent, received, received_there, chunks, table)]
    counts = [_among_all(_known(plan), plan.experts, local) for plan in plans]
    # Of each chunk its own experts, of all others 0: [size, C, C] -> [C, C * size].
    by_chunk = torch.diag_embed(received_there.sum(0).view(chunks, -1).t()).permute(1, 2, 0).reshape(chunks, local)
    shared = PieceRows(counts, torch.cat([on_device[1][own : own + 1], by_chunk]))
    all_rows = PlainRows(layout=whole, order=None)
    return ChunkedPlan(tokens_shape=tokens_shape, whole=all_rows, chunks=plans, shared=shared)


def _own_chunk(whole: PermuteLayout, rows_L: GroupRows) -> ChunkPlan:
    """The first rows of a layout, which stay here; they are by expert already."""
    rows = slice(0, sum(rows_L))
    return ChunkPlan(
        rows=rows,
        experts=slice(0, len(rows_L)),
        sends=PlainRows(layout=chunk_of(whole, rows), order=None),
        input_splits=[],
        output_splits=[],
        tokens_per_expert=rows_L,
        table=None,
        here=True,
    )


def _without(counts_PL: Tensor, own: int) -> Tensor:
    counts_PL = counts_PL.clone()
    counts_PL[own].zero_()
    return counts_PL


def _known(plan: ChunkPlan) -> GroupRows:
    assert isinstance(plan.tokens_per_expert, GroupRows), "only dispatch='static' leaves them on the device"
    return plan.tokens_per_expert


def _among_all(rows: Sequence[int], experts: slice, local: int) -> list[int]:
    """Rows of each of L experts, 0 for those that are not of these."""
    return [0] * experts.start + list(rows) + [0] * (local - experts.stop)


def _between_ranks(table: Callable[[slice], Table | None]) -> Callable[[slice], Table | None]:
    """The same without the rows that stay on their rank."""

    def between(experts: slice) -> Table | None:
        whole = table(experts)
        if whole is None:
            return None
        return [[0 if source == target else n for target, n in enumerate(row)] for source, row in enumerate(whole)]

    return between


def _chunks_of_experts(
    whole: PermuteLayout,
    start: int,
    sent_PL: Tensor,
    counts_PL: Tensor,
    on_device_PL: Tensor,
    chunks: int,
    table: Callable[[slice], Table | None],
) -> list[ChunkPlan]:
    """The chunks whose rows begin at ``start``. Rows sent and received are on the host, received ones there too."""
    rows_L = on_device_PL.sum(0)
    size, plans = counts_PL.shape[1] // chunks, []
    for number in range(chunks):
        experts = slice(number * size, (number + 1) * size)
        input_splits = sent_PL[:, experts].sum(1).tolist()
        rows = slice(start, start + sum(input_splits))
        received = counts_PL[:, experts]
        order, ends = _order(received, on_device_PL[:, experts])
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
    return plans


def _order(received_PL: Tensor, on_device_PL: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Of a chunk's received rows, by expert, None where they come so; and where each expert's end, if known."""
    if 1 in received_PL.shape or int(received_PL.any(1).sum()) == 1:  # of one rank alone they do
        return None, None
    rows, inverse, ends = kernels_of(on_device_PL).chunk_order(on_device_PL, received_PL)
    return (rows, inverse), ends

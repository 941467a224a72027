"""What travels when a token goes once to each rank: rows with the slots of their experts, expanded and reduced there.

A payload row is ``[H token columns | S probabilities | S expert numbers | filling]``; the tail is bits of the
probabilities' dtype, in multiples of 16 bytes. It tells the receiver which of its experts want the row: ``Arrival``
holds the layout that follows. Gradients come back in rows of the same width, in which the numbers mean nothing.

The receiver adds the outputs (and in the backward dX) of a token's local experts in ascending expert order, the sender
the ranks' sums in rank order, both by ``Kernels.sum_rows``: half precision is added in fp32 and rounded once.

N rows before dispatch, M rows received, R rows of the experts, S slots, H hidden, Q expert-tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.routed import RoutedRows, Slots
from fluid_npu.ops.once import OnceLayout
from fluid_npu.ops.permute import PermuteLayout

_ALIGN_BYTES = 16
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class SlotRow:
    """The columns of a payload row. ``wire`` is the dtype of probabilities, no narrower than that of tokens."""

    hidden: int
    slots: int
    wire: torch.dtype

    @property
    def tail_columns(self) -> int:
        """Length of the tail in elements of ``wire``."""
        unit = _ALIGN_BYTES // self.wire.itemsize
        return -(-2 * self.slots // unit) * unit

    def width(self, dtype: torch.dtype) -> int:
        """Columns of a payload of tokens of ``dtype``."""
        return self.hidden + self.tail_columns * self.wire.itemsize // dtype.itemsize

    def in_groups_of(self, local: int) -> Slots:
        """What kernels are told of these columns; ``local`` is L."""
        return Slots(self.slots, self.tail_columns, self.wire, local)

    def write(self, payload: Tensor, p_NS: Tensor, expert_NS: Tensor | None) -> None:
        """Puts the tails of the rows of ``payload`` in place."""
        tail = p_NS.new_zeros(payload.shape[0], self.tail_columns)
        tail[:, : self.slots] = p_NS
        if expert_NS is not None:
            numbers = expert_NS.to(_INTEGERS[self.wire.itemsize])
            tail[:, self.slots : 2 * self.slots] = numbers.view(self.wire)
        payload[:, self.hidden :] = tail.view(payload.dtype)

    def read_probs(self, payload: Tensor) -> Tensor:
        """[N, S], a view of a copy."""
        return self._tail(payload)[:, : self.slots]

    def read(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """[N, S] probabilities and expert numbers."""
        tail = self._tail(payload)
        numbers = tail[:, self.slots : 2 * self.slots].contiguous().view(_INTEGERS[self.wire.itemsize])
        return tail[:, : self.slots], numbers

    def _tail(self, payload: Tensor) -> Tensor:
        return payload[:, self.hidden :].contiguous().view(self.wire)


@dataclass(kw_only=True)
class Arrival:
    """How received rows become rows of experts. One a dispatch, filled when its rows are there.

    The rows themselves say it, so it cannot be part of the plan that was made before they were sent.
    """

    expert_rows: int
    """R, which the host knows from the counts."""
    _layout: PermuteLayout | None = field(default=None, init=False)

    def settle(self, expert_MS: Tensor) -> PermuteLayout:
        """The layout of these slots, kept for the backward and for combine."""
        self._layout = PermuteLayout.from_slots(expert_MS, self.expert_rows)
        return self._layout

    def settle_as(self, find: Callable[[Tensor, Slots, int], RoutedRows], rows: Tensor, slots: Slots) -> PermuteLayout:
        """The same, found by a kernel in the payload rows."""
        found = find(rows, slots, self.expert_rows)
        self._layout = PermuteLayout.of_routed(found, rows.shape[0], slots.number, most_rows=slots.number)
        return self._layout

    @property
    def layout(self) -> PermuteLayout:
        """M rows as tokens. Raises RuntimeError before the dispatch was waited for."""
        if self._layout is None:
            raise RuntimeError("combine before the dispatch has arrived: wait for the dispatch's handle first")
        return self._layout


@dataclass(frozen=True)
class PackOnce:
    """Loads ``[T, H]`` tokens and ``[T, E]`` probabilities of dtype ``row.wire`` as ``[N, W]`` payload rows."""

    layout: OnceLayout
    row: SlotRow

    def load(self, *tensors: Tensor) -> Tensor:
        x_TH, probs_TE = tensors
        rows, slots = self.layout.rows, self.row.in_groups_of(self.layout.local)
        map_TE, fused = self.layout.map_TE, kernels_of(x_TH).once(x_TH, slots)
        if fused is not None and map_TE is not None and probs_TE.is_contiguous():
            return fused.pack_once(x_TH, probs_TE, map_TE, rows, slots)
        payload = x_TH.new_empty(rows.num_rows, self.row.width(x_TH.dtype))
        torch.index_select(x_TH, 0, rows.token_of_row, out=payload[:, : self.row.hidden])
        # An empty slot carries some probability, which nobody reads.
        pair_NS = self.layout.slot_pair.clamp(max=max(probs_TE.numel() - 1, 0))
        self.row.write(payload, torch.take(probs_TE, pair_NS), self.layout.slot_expert)
        return payload

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        tokens, experts = self.layout.rows.num_tokens, self.layout.num_experts
        slots = self.row.in_groups_of(self.layout.local)
        map_TE, fused = self.layout.map_TE, kernels_of(rows).once(rows, slots)
        if fused is not None and map_TE is not None:
            return fused.sum_once(rows, map_TE, self.layout.rows, slots, self.layout.rows.most_rows or experts)
        dx_TH = kernels_of(rows).sum_rows(rows[:, : self.row.hidden].contiguous(), self.layout.rows)
        dp_NS = self.row.read_probs(rows)
        # Every (token, expert) has at most one slot; empty slots write behind the end.
        dprobs = dp_NS.new_zeros(tokens * experts + 1)
        dprobs.scatter_(0, self.layout.slot_pair.view(-1), dp_NS.reshape(-1))
        return dx_TH, dprobs[:-1].view(tokens, experts)


@dataclass(frozen=True)
class Expand:
    """Unloads payload rows as ``[R, H]`` tokens by expert and their ``[R]`` probabilities; fills ``arrival``."""

    row: SlotRow
    arrival: Arrival
    local: int | None = None
    """L; None: plain torch."""

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        slots = self.row.in_groups_of(self.local or 0)
        fused = kernels_of(rows).once(rows, slots) if self.local else None
        if fused is not None:
            return fused.expand_rows(rows, self.arrival.settle_as(fused.arrived_rows, rows, slots), slots)
        p_MS, expert_MS = self.row.read(rows)
        layout = self.arrival.settle(expert_MS)
        x_RH = kernels_of(rows).permute(rows[:, : self.row.hidden], layout)
        return x_RH, torch.take(p_MS, layout.pair_index)

    def load_grad(self, *grads: Tensor) -> Tensor:
        dx_RH, dp_R = grads
        layout, slots = self.arrival.layout, self.row.in_groups_of(self.local or 0)
        fused = kernels_of(dx_RH).once(dx_RH, slots) if self.local else None
        if fused is not None:
            return fused.reduce_rows(dx_RH, dp_R, layout, slots)
        payload = dx_RH.new_empty(layout.num_tokens, self.row.width(dx_RH.dtype))
        payload[:, : self.row.hidden] = kernels_of(dx_RH).sum_rows(dx_RH.contiguous(), layout)
        dp_MS = dp_R.new_zeros(layout.num_tokens * self.row.slots).scatter_(0, layout.pair_index, dp_R)
        self.row.write(payload, dp_MS.view(-1, self.row.slots), None)
        return payload


@dataclass(frozen=True)
class Reduce:
    """Loads ``[R, H]`` rows of experts as ``[M, H]``: the sum over each received row's experts."""

    arrival: Arrival

    def load(self, *tensors: Tensor) -> Tensor:
        return kernels_of(tensors[0]).sum_rows(tensors[0].contiguous(), self.arrival.layout)

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        return (kernels_of(rows).permute(rows, self.arrival.layout),)


@dataclass(frozen=True)
class MergeOnce:
    """Unloads ``[N, H]`` rows as the sum of each token's rows, in ``shape``."""

    layout: OnceLayout
    shape: torch.Size

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (kernels_of(rows).sum_rows(rows, self.layout.rows).view(self.shape),)

    def load_grad(self, *grads: Tensor) -> Tensor:
        return kernels_of(grads[0]).permute(grads[0].reshape(-1, self.shape[-1]), self.layout.rows)


@dataclass(frozen=True)
class ReplicateOnce:
    """Loads a payload ``times`` times over; the gradient is the sum over copies of tokens and of probabilities."""

    times: int
    row: SlotRow

    def load(self, *tensors: Tensor) -> Tensor:
        return tensors[0].repeat(self.times, 1)

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        total = rows.view(self.times, -1, rows.shape[1]).sum(0)
        # The tail is bits, not numbers of the payload's dtype: it is summed as probabilities.
        p_NS = self.row.read_probs(rows).reshape(self.times, -1, self.row.slots).sum(0)
        self.row.write(total, p_NS, None)
        return (total,)

"""What a rank does with rows that every rank sends to every rank, whose number nobody need tell it.

The payload is that of ``ops.payload_once``; a row may have no slot filled. Where its rows of experts are is found on
the device when it arrives (``Arrived``), in buffers with room for the most that there can be, or for as many as ranks
agreed on; how many there are is a ``DeviceRows``. What is behind them in those buffers is memory that nobody wrote or
reads. Rows that a buffer has no room for are left out, the last ones: then nothing may be used of the step. Sums run in
the order of ``payload_once``, so that both forms have the same bits.

M rows received, S slots, L local experts, C rows of the experts' buffers, R of them in use, H hidden, W payload width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.base import StaticKernels
from fluid_npu.device.kernels.groups import DeviceRows
from fluid_npu.device.kernels.known_rows import known, whole
from fluid_npu.device.kernels.routed import Slots
from fluid_npu.ops.payload_once import SlotRow
from fluid_npu.ops.permute import PermuteLayout


class Arrived(Protocol):
    """Received rows whose places among the rows of the experts are known."""

    def expand(self, payload_MW: Tensor) -> tuple[Tensor, Tensor]:
        """([C, H], [C]): the token of each of the experts' rows and the probability of its slot."""

    def reduce(self, dx_CH: Tensor, dp_C: Tensor) -> Tensor:
        """[M, W]: the sum over each received row's slots, and the gradient of each slot's probability."""

    def sum(self, x_CH: Tensor) -> Tensor:
        """[M, H]: the sum over each received row's slots."""

    def spread(self, rows_MH: Tensor) -> Tensor:
        """[C, H]: each received row at the places of its slots."""


@dataclass(kw_only=True)
class StaticArrival:
    """Where received rows go. One a dispatch, filled when its rows are there."""

    experts: DeviceRows
    """Settled at the same time."""
    _arrived: Arrived | None = field(default=None, init=False)

    def settle(self, payload_MW: Tensor, row: SlotRow) -> Arrived:
        """What these rows say, kept for combine and the backward."""
        slots = row.in_groups_of(len(self.experts))
        fused = kernels_of(payload_MW).static(payload_MW, slots)
        self._arrived = (
            _Plain(payload_MW, row, self.experts) if fused is None else _Fused(fused, payload_MW, slots, self.experts)
        )
        return self._arrived

    @property
    def arrived(self) -> Arrived:
        """Raises RuntimeError before the dispatch was waited for."""
        if self._arrived is None:
            raise RuntimeError("combine before the dispatch has arrived: wait for the dispatch's handle first")
        return self._arrived


@dataclass(frozen=True)
class ExpandStatic:
    """Unloads payload rows as ``[C, H]`` tokens by expert and their ``[C]`` probabilities; fills ``arrival``."""

    row: SlotRow
    arrival: StaticArrival

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        return self.arrival.settle(rows, self.row).expand(rows)

    def load_grad(self, *grads: Tensor) -> Tensor:
        return self.arrival.arrived.reduce(grads[0].contiguous(), grads[1])


@dataclass(frozen=True)
class ReduceStatic:
    """Loads ``[C, H]`` rows of experts as ``[M, H]``: the sum over each received row's experts."""

    arrival: StaticArrival

    def load(self, *tensors: Tensor) -> Tensor:
        return self.arrival.arrived.sum(tensors[0].contiguous())

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        return (self.arrival.arrived.spread(rows),)


class _Fused:
    """``Arrived`` by kernels that need no host."""

    def __init__(self, kernels: StaticKernels, payload_MW: Tensor, slots: Slots, experts: DeviceRows) -> None:
        self._kernels, self._capacity, self._slots = kernels, experts.capacity, slots
        self._place, ends = kernels.place_rows(payload_MW, slots, self._capacity)
        experts.settle(ends)

    def expand(self, payload_MW: Tensor) -> tuple[Tensor, Tensor]:
        return self._kernels.expand_rows(payload_MW, self._place, self._capacity, self._slots)

    def reduce(self, dx_CH: Tensor, dp_C: Tensor) -> Tensor:
        return self._kernels.reduce_rows(dx_CH, dp_C, self._place, self._slots)

    def sum(self, x_CH: Tensor) -> Tensor:
        return self._kernels.sum_rows(x_CH, self._place)

    def spread(self, rows_MH: Tensor) -> Tensor:
        return self._kernels.spread_rows(rows_MH, self._place, self._capacity)


class _Plain:
    """``Arrived`` in plain torch: the host reads how many rows there are, and computes as ``payload_once``."""

    def __init__(self, payload_MW: Tensor, row: SlotRow, experts: DeviceRows) -> None:
        self._row, self._experts = row, experts
        _, expert_MS = row.read(payload_MW)
        counts_L = torch.bincount(expert_MS.reshape(-1), minlength=len(experts) + 1)[: len(experts)]
        experts.settle(counts_L.cumsum(0).clamp(max=experts.capacity))
        self._layout = PermuteLayout.from_slots(expert_MS, sum(experts.on_host()))

    def expand(self, payload_MW: Tensor) -> tuple[Tensor, Tensor]:
        p_MS, _ = self._row.read(payload_MW)
        x_RH = kernels_of(payload_MW).permute(payload_MW[:, : self._row.hidden], self._layout)
        return self._whole(x_RH), self._whole(torch.take(p_MS, self._layout.pair_index))

    def reduce(self, dx_CH: Tensor, dp_C: Tensor) -> Tensor:
        _, (dx_RH, dp_R) = known(self._experts, dx_CH, dp_C)
        row = replace(self._row, hidden=dx_RH.shape[1])  # coded tokens are narrower than their gradients
        rows, slots = self._layout.num_tokens, row.slots
        payload = dx_RH.new_empty(rows, row.width(dx_RH.dtype))
        payload[:, : row.hidden] = kernels_of(dx_RH).sum_rows(dx_RH, self._layout)
        dp_MS = dp_R.new_zeros(rows * slots).scatter_(0, self._layout.pair_index, dp_R)
        row.write(payload, dp_MS.view(-1, slots), None)
        return payload

    def sum(self, x_CH: Tensor) -> Tensor:
        _, (x_RH,) = known(self._experts, x_CH)
        return kernels_of(x_RH).sum_rows(x_RH, self._layout)

    def spread(self, rows_MH: Tensor) -> Tensor:
        return self._whole(kernels_of(rows_MH).permute(rows_MH, self._layout))

    def _whole(self, y: Tensor) -> Tensor:
        return whole(y, self._experts.capacity)

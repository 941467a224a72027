"""Which rows a dispatch moves: one for each (token, expert), for each (token, rank), for each (token, node) and then
(token, rank), or each token for every rank.

All forms answer the same five questions, so that the dispatcher does not ask which one it has: what goes into the
dispatch and comes out of it, what goes into the combine and comes out, and what expert-tensor-parallel ranks are given
in between. R rows of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fluid_npu.comm.cargo import AS_IS, Loading, Unloading
from fluid_npu.ops.once import OnceLayout
from fluid_npu.ops.payload import Merge, Pack, Reorder, Replicate, Unpack
from fluid_npu.ops.payload_node import MergeRelayed, Relay, Relayed
from fluid_npu.ops.payload_once import Arrival, Expand, MergeOnce, PackOnce, Reduce, ReplicateOnce, SlotRow
from fluid_npu.ops.payload_static import ExpandStatic, ReduceStatic, StaticArrival
from fluid_npu.ops.permute import PermuteLayout


class RowForm(Protocol):
    """Cargo of one dispatch and its combine. ``hidden`` is H, ``wire`` the dtype in which probabilities travel."""

    def pack(self, hidden: int, wire: torch.dtype) -> Loading:
        """From tokens and their probabilities to the rows that the dispatch sends."""

    def unpack(self, hidden: int, wire: torch.dtype) -> Unloading:
        """From received rows to rows by local expert and their probabilities."""

    def replicate(self, times: int, hidden: int, wire: torch.dtype) -> Loading:
        """From received rows to as many copies of them, for expert-tensor-parallel ranks."""

    def collect(self) -> Loading:
        """From the experts' outputs to the rows that go back."""

    def merge(self, shape: torch.Size) -> Unloading:
        """From the rows that came back to tokens."""


@dataclass(frozen=True, kw_only=True)
class PlainRows:
    """A row for each (token, expert), as Megatron sends them."""

    layout: PermuteLayout
    order: tuple[Tensor, Tensor] | None
    """[R] which received row comes at each place of the experts' order, and the inverse; None when in order already."""

    def pack(self, hidden: int, wire: torch.dtype) -> Loading:
        return Pack(self.layout, hidden, wire)

    def unpack(self, hidden: int, wire: torch.dtype) -> Unloading:
        return Unpack(hidden, wire, self.order[0] if self.order is not None else None)

    def replicate(self, times: int, hidden: int, wire: torch.dtype) -> Loading:
        return Replicate(times, hidden, wire)

    def collect(self) -> Loading:
        return AS_IS if self.order is None else Reorder(self.order[1], self.order[0])

    def merge(self, shape: torch.Size) -> Unloading:
        return Merge(self.layout, shape)


@dataclass(frozen=True, kw_only=True)
class OnceRows:
    """A row for each (token, rank): the receiver expands it to its experts' rows and adds up their outputs."""

    layout: OnceLayout
    arrival: Arrival

    def pack(self, hidden: int, wire: torch.dtype) -> Loading:
        return PackOnce(self.layout, self._row(hidden, wire))

    def unpack(self, hidden: int, wire: torch.dtype) -> Unloading:
        return Expand(self._row(hidden, wire), self.arrival, self.layout.local)

    def replicate(self, times: int, hidden: int, wire: torch.dtype) -> Loading:
        return ReplicateOnce(times, self._row(hidden, wire))

    def collect(self) -> Loading:
        return Reduce(self.arrival)

    def merge(self, shape: torch.Size) -> Unloading:
        return MergeOnce(self.layout, shape)

    def _row(self, hidden: int, wire: torch.dtype) -> SlotRow:
        return SlotRow(hidden=hidden, slots=self.layout.num_slots, wire=wire)


@dataclass(frozen=True, kw_only=True)
class StaticRows:
    """A row for each (token, rank), wanted there or not: what arrives is found on the device."""

    layout: OnceLayout
    arrival: StaticArrival

    def pack(self, hidden: int, wire: torch.dtype) -> Loading:
        return PackOnce(self.layout, self._row(hidden, wire))

    def unpack(self, hidden: int, wire: torch.dtype) -> Unloading:
        return ExpandStatic(self._row(hidden, wire), self.arrival)

    def replicate(self, times: int, hidden: int, wire: torch.dtype) -> Loading:
        raise ValueError("dispatch='static' has no form for expert tensor parallelism")

    def collect(self) -> Loading:
        return ReduceStatic(self.arrival)

    def merge(self, shape: torch.Size) -> Unloading:
        return MergeOnce(self.layout, shape)

    def _row(self, hidden: int, wire: torch.dtype) -> SlotRow:
        return SlotRow(hidden=hidden, slots=self.layout.num_slots, wire=wire)


@dataclass(frozen=True, kw_only=True)
class NodeRows:
    """A row for each (token, node), which one rank there turns into one for each (token, rank)."""

    layout: OnceLayout
    """Nodes are its groups."""
    relayed: Relayed
    arrival: Arrival
    local: int
    """L."""

    def pack(self, hidden: int, wire: torch.dtype) -> Loading:
        return PackOnce(self.layout, self._came(hidden, wire))

    def relay(self, hidden: int, wire: torch.dtype) -> Loading:
        """From rows that came to this rank to those for the ranks of its node."""
        return Relay(self._came(hidden, wire), self._goes(hidden, wire), self.relayed)

    def unpack(self, hidden: int, wire: torch.dtype) -> Unloading:
        return Expand(self._goes(hidden, wire), self.arrival, self.local)

    def replicate(self, times: int, hidden: int, wire: torch.dtype) -> Loading:
        raise ValueError("dispatch='once-per-node' has no form for expert tensor parallelism")

    def collect(self) -> Loading:
        return Reduce(self.arrival)

    def gather(self) -> Unloading:
        """From the sums of the node's ranks to one sum for each row that came to this rank."""
        return MergeRelayed(self.relayed)

    def merge(self, shape: torch.Size) -> Unloading:
        return MergeOnce(self.layout, shape)

    def _came(self, hidden: int, wire: torch.dtype) -> SlotRow:
        return SlotRow(hidden=hidden, slots=self.layout.num_slots, wire=wire)

    def _goes(self, hidden: int, wire: torch.dtype) -> SlotRow:
        return SlotRow(hidden=hidden, slots=min(self.layout.num_slots, self.local), wire=wire)

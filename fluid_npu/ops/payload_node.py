"""What a rank does with rows that came to its node once, and go on once to each rank of it that holds their experts.

The rows are those of ``ops.payload_once`` with a node for a group: their slots are experts of the node. ``Relay`` makes
of them rows whose slots are experts of one rank, by the same functions; ``MergeRelayed`` adds up, for each row that
came, the ranks' sums in rank order, before the sum goes back to the token's node. A gradient takes the same two steps
the other way.

M rows that came to this rank, D experts of the node, L of a rank, S slots of a row that came, Z of one that goes on,
W payload width, N rows that go on, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.ops.once import OnceLayout, groups_of_tokens, once_layout
from fluid_npu.ops.payload_once import SlotRow


@dataclass(kw_only=True)
class Relayed:
    """Which rows go on to whom. One a dispatch, filled when its rows have come to the node."""

    node_experts: int
    """D."""
    ranks: int
    """Of the node."""
    rows: int
    """N, which the host knows from the counts."""
    _layout: OnceLayout | None = field(default=None, init=False)

    def settle(self, expert_MS: Tensor) -> OnceLayout:
        """The layout of these slots, kept for the backward and for combine."""
        expert_MS = expert_MS.long()
        map_MR = groups_of_tokens(expert_MS, self.node_experts, self.ranks)
        self._layout = once_layout(expert_MS, map_MR, self.node_experts, self.rows)
        return self._layout

    @property
    def layout(self) -> OnceLayout:
        """M rows as tokens, ranks as groups. Raises RuntimeError before the dispatch came to the node."""
        if self._layout is None:
            raise RuntimeError("combine before the dispatch has arrived: wait for the dispatch's handle first")
        return self._layout


@dataclass(frozen=True)
class Relay:
    """Loads payload rows of tokens of a node as rows for its ranks; fills ``relayed``."""

    came: SlotRow
    goes: SlotRow
    relayed: Relayed

    def load(self, *tensors: Tensor) -> Tensor:
        (payload_MW,) = tensors
        p_MS, expert_MS = self.came.read(payload_MW)
        layout = self.relayed.settle(expert_MS)
        rows = payload_MW.new_empty(layout.rows.num_rows, self.goes.width(payload_MW.dtype))
        hidden = self.came.hidden
        torch.index_select(payload_MW[:, :hidden], 0, layout.rows.token_of_row, out=rows[:, :hidden])
        # An empty slot carries some probability, which nobody reads.
        place_NZ = layout.slot_place.clamp(max=max(p_MS.numel() - 1, 0))
        self.goes.write(rows, torch.take(p_MS, place_NZ), layout.slot_expert)
        return rows

    def unload_grad(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        layout, hidden = self.relayed.layout, self.came.hidden
        came = layout.rows.num_tokens
        payload = rows.new_empty(came, self.came.width(rows.dtype))
        payload[:, :hidden] = kernels_of(rows).sum_rows(rows[:, :hidden].contiguous(), layout.rows)
        dp_NZ = self.goes.read_probs(rows)
        # Every slot of a row that came went to one place; empty slots write behind the end.
        dp = dp_NZ.new_zeros(came * self.came.slots + 1)
        dp.scatter_(0, layout.slot_place.view(-1), dp_NZ.reshape(-1))
        self.came.write(payload, dp[:-1].view(came, self.came.slots), None)
        return (payload,)


@dataclass(frozen=True)
class MergeRelayed:
    """Unloads the ``[N, H]`` sums of a node's ranks as ``[M, H]``: one for each row that came to this rank."""

    relayed: Relayed

    def unload(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (kernels_of(rows).sum_rows(rows, self.relayed.layout.rows),)

    def load_grad(self, *grads: Tensor) -> Tensor:
        return kernels_of(grads[0]).permute(grads[0].contiguous(), self.relayed.layout.rows)

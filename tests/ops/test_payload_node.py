"""Rows that go to a node once and on to its ranks: what arrives, and the sums on the way back, all in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_npu.ops.payload import wire_dtype
from fluid_npu.ops.payload_node import MergeRelayed, Relay, Relayed
from fluid_npu.ops.payload_once import Arrival, Expand, MergeOnce, PackOnce, Reduce, SlotRow
from tests.ops.test_once import DTYPES, HIDDEN, close, layout_of, random_map
from tests.support.device import here, wide


@dataclass
class Node:
    """One node with all of a job's experts and ``ranks`` ranks, seen from the rank that rows came to."""

    map_TE: torch.Tensor
    most: int
    ranks: int
    wire: torch.dtype

    def __post_init__(self) -> None:
        experts, local = self.map_TE.shape[1], self.map_TE.shape[1] // self.ranks
        self.layout = layout_of(self.map_TE, self.most, 1)
        self.came = SlotRow(hidden=HIDDEN, slots=self.layout.num_slots, wire=self.wire)
        self.goes = SlotRow(hidden=HIDDEN, slots=min(self.layout.num_slots, local), wire=self.wire)
        parts = self.map_TE.chunk(self.ranks, 1)
        self.splits = [int(part.any(1).sum()) for part in parts]
        self.relayed = Relayed(node_experts=experts, ranks=self.ranks, rows=sum(self.splits))
        self.arrivals = [Arrival(expert_rows=int(part.sum())) for part in parts]


def check_node(map_TE: torch.Tensor, most: int, ranks: int, dtype: torch.dtype, probs: torch.dtype) -> None:
    """Experts get their tokens and probabilities; gradients and outputs come back as dense sums."""
    map_TE, wire = here(map_TE), wire_dtype(dtype, probs)
    node = Node(map_TE, most, ranks, wire)
    x, p = here(torch.randn(len(map_TE), HIDDEN).to(dtype)), here(torch.rand(map_TE.shape).to(probs)).to(wire)
    pack, relay = PackOnce(node.layout, node.came), Relay(node.came, node.goes, node.relayed)
    parts = relay.load(pack.load(x, p)).split(node.splits)
    local = map_TE.shape[1] // ranks
    grads, outs = [], []
    for rank, (rows, arrival) in enumerate(zip(parts, node.arrivals, strict=True)):
        expand = Expand(node.goes, arrival, local)
        x_RH, p_R = expand.unload(rows)
        mine = range(rank * local, (rank + 1) * local)
        assert torch.equal(x_RH, torch.cat([x[map_TE[:, e]] for e in mine]))
        assert torch.equal(p_R, torch.cat([p[map_TE[:, e], e] for e in mine]))
        grads.append(expand.load_grad(x_RH, p_R))
        outs.append(Reduce(arrival).load(x_RH))
    (came,) = relay.unload_grad(torch.cat(grads))
    assert came is not None
    dx, dp = pack.unload_grad(came)
    want = wide(x) * map_TE.cpu().sum(1, keepdim=True)
    close(dx, want, dtype)
    assert torch.equal(dp, p * map_TE)
    (sums,) = MergeRelayed(node.relayed).unload(torch.cat(outs))
    (out,) = MergeOnce(node.layout, x.shape).unload(sums)
    close(out, want, dtype)
    # The gradient of an output goes to each rank's row of it.
    back = MergeRelayed(node.relayed).load_grad(sums)
    tokens = node.relayed.layout.rows.token_of_row
    assert torch.equal(back, sums.index_select(0, tokens))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_experts_get_their_tokens_and_sums_come_back(data: st.DataObject) -> None:
    ranks, local = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 6))
    most = data.draw(st.integers(1, min(8, ranks * local)))
    uneven, seed, tokens = data.draw(st.booleans()), data.draw(st.integers(0, 999)), data.draw(st.integers(0, 12))
    dtype, probs = data.draw(st.sampled_from(DTYPES))
    check_node(random_map(tokens, ranks * local, most, seed, uneven), most, ranks, dtype, probs)


def test_a_token_goes_on_once_to_each_rank_with_some_of_its_experts() -> None:
    map_TE = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    node = Node(here(map_TE), 3, 2, torch.float32)
    x, p = here(torch.randn(3, HIDDEN)), here(torch.rand(3, 4))
    payload = PackOnce(node.layout, node.came).load(x, p)
    rows = Relay(node.came, node.goes, node.relayed).load(payload)
    assert payload.shape[0] == 2 and rows.shape[0] == 3
    layout = node.relayed.layout
    assert layout.rows.token_of_row.tolist() == [0, 0, 1], "by rank and then by row"
    assert layout.slot_expert.tolist() == [[0, 1], [0, 2], [0, 1]], "2 stands for no expert"
    assert layout.slot_place.tolist() == [[0, 1], [2, 6], [3, 4]], "6 is behind the slots of both rows"


def test_a_combine_before_the_rows_came_is_said() -> None:
    merge: Any = MergeRelayed(Relayed(node_experts=4, ranks=2, rows=3))
    with pytest.raises(RuntimeError, match="combine before the dispatch has arrived"):
        merge.unload(torch.zeros(3, HIDDEN))

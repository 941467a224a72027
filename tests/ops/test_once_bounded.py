"""Rows of a token for each rank in blocks of a fixed size: those of counted blocks, then filling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluid_npu.ops.once import OnceLayout, once_counts
from fluid_npu.ops.once_bounded import bounded_groups
from fluid_npu.ops.payload_once import MergeOnce, PackOnce, SlotRow

TOKENS, EXPERTS, GROUPS, TOPK, HIDDEN = 50, 8, 4, 3, 16


def routed(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen_TK = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :TOPK]
    map_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, chosen_TK, True)
    map_TE[7] = False  # a token that was dropped
    return map_TE


def both(room_G: list[int]) -> tuple[OnceLayout, OnceLayout, list[int]]:
    """The layout with counted sizes, that with fixed ones, and how many rows each group has."""
    map_TE = routed()
    counts_GC, layout_of = once_counts(map_TE, TOPK, GROUPS)
    counts = counts_GC[:, 0].tolist()
    bounded, short = bounded_groups(map_TE, TOPK, room_G)
    assert bool(short) == any(count > room for count, room in zip(counts, room_G, strict=True))
    return layout_of(sum(counts)), bounded, counts


def test_a_block_starts_with_the_rows_that_were_asked_for_and_the_others_have_no_slot() -> None:
    room_G = [45, 40, 44, 50]
    counted, bounded, counts = both(room_G)
    assert bounded.rows.num_rows == sum(room_G)
    assert sorted(bounded.rows.row_of_pair.tolist()) == list(range(sum(room_G)))
    at = where = 0
    for count, room in zip(counts, room_G, strict=True):
        assert torch.equal(bounded.rows.token_of_row[at : at + count], counted.rows.token_of_row[where : where + count])
        assert torch.equal(bounded.slot_expert[at : at + count], counted.slot_expert[where : where + count])
        assert (bounded.slot_expert[at + count : at + room] == EXPERTS // GROUPS).all()
        at, where = at + room, where + count


def test_sums_over_a_tokens_rows_are_those_of_counted_sizes() -> None:
    """Of rows that came back, those of the filling zero as their receivers send them, and of gradients."""
    counted, bounded, counts = both([45, 40, 44, 50])
    asked = torch.cat([torch.arange(c) + sum([45, 40, 44, 50][:g]) for g, c in enumerate(counts)])
    came = torch.randn(sum(counts), HIDDEN)
    padded = torch.zeros(bounded.rows.num_rows, HIDDEN).index_copy_(0, asked, came)
    shape = torch.Size((TOKENS, HIDDEN))
    assert torch.equal(MergeOnce(bounded, shape).unload(padded)[0], MergeOnce(counted, shape).unload(came)[0])
    row = SlotRow(hidden=HIDDEN, slots=counted.num_slots, wire=torch.float32)
    payload = torch.randn(sum(counts), row.width(torch.float32))
    wide = torch.zeros(bounded.rows.num_rows, payload.shape[1]).index_copy_(0, asked, payload)
    found, wanted = PackOnce(bounded, row).unload_grad(wide), PackOnce(counted, row).unload_grad(payload)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_what_is_packed_is_what_counted_sizes_pack() -> None:
    counted, bounded, counts = both([45, 40, 44, 50])
    x, probs = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, EXPERTS)
    row = SlotRow(hidden=HIDDEN, slots=counted.num_slots, wire=torch.float32)
    found, wanted = (PackOnce(layout, row).load(x, probs) for layout in (bounded, counted))
    assert torch.equal(found[: counts[0]], wanted[: counts[0]])


@pytest.mark.parametrize("room_G", [[45, 20, 44, 50], [TOKENS] * GROUPS, [40, 0, 0, 0], [16] * GROUPS])
def test_any_sizes_are_held_in_bounds(room_G: list[int]) -> None:
    _, bounded, _ = both(room_G)
    rows = bounded.rows
    assert rows.num_rows == sum(room_G)
    assert ((rows.token_of_row >= 0) & (rows.token_of_row < TOKENS)).all()
    assert sorted(rows.row_of_pair.tolist()) == list(range(sum(room_G)))
    assert (rows.bag_offsets.diff() >= 0).all() and int(rows.bag_offsets[-1]) <= rows.num_rows

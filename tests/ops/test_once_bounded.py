"""Rows of a token for each rank in blocks of a fixed size: those of counted blocks, then filling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluid_npu.ops.once import OnceLayout, every_group, once_counts
from fluid_npu.ops.once_bounded import bounded_groups
from fluid_npu.ops.payload_once import MergeOnce, PackOnce, SlotRow
from tests.support.triton_bounded_cases import BOUNDED_TRIES, map_of

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
    bounded, told = bounded_groups(map_TE, TOPK, room_G)
    assert bool(told[0]) == any(count > room for count, room in zip(counts, room_G, strict=True))
    assert told[1:].tolist() == counts_GC[:, 1:].sum(1).tolist() and told.dtype == torch.int32
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


@pytest.mark.parametrize("tried", BOUNDED_TRIES, ids=str)
def test_rows_are_those_that_a_loop_over_tokens_finds(tried: tuple[int, int, int, list[int | None]]) -> None:
    """Rooms for all, for some, for nothing and closed ones; tokens without experts."""
    tokens, local, topk, room_G = tried
    groups = len(room_G)
    map_TE = map_of(tokens, groups * local, topk, seed=tokens)
    seen_TE = map_TE & torch.tensor([room is not None for room in room_G for _ in range(local)])
    wanted = seen_TE.view(tokens, groups, local).any(2).tolist()
    rows = []  # (token, group), by group, those that were asked for first
    for group, room in enumerate(room_G):
        order = sorted(range(tokens), key=lambda token: not wanted[token][group])
        if all(room == tokens for room in room_G):
            order = list(range(tokens))
        rows += [(token, group) for token in order[: room or 0]]
    told = torch.full((3, 1 + groups), -7, dtype=torch.int32)
    layout, given = bounded_groups(map_TE, topk, room_G, told[1])
    assert given.data_ptr() == told[1].data_ptr() and (told[::2] == -7).all()
    short = any(sum(of[g] for of in wanted) > room for g, room in enumerate(room_G) if room is not None)
    assert given.tolist() == [int(short), *seen_TE.view(tokens, groups, local).sum((0, 2)).tolist()]
    assert layout.rows.token_of_row.tolist() == [token for token, _ in rows]
    assert layout.rows.pair_index.tolist() == [token * groups + group for token, group in rows]
    assert layout.num_slots == min(topk, local)
    if all(room == tokens for room in room_G):
        assert torch.equal(layout.rows.row_of_pair, every_group(map_TE, topk, groups).rows.row_of_pair)
    else:
        by_token = sorted(range(len(rows)), key=lambda row: (not wanted[rows[row][0]][rows[row][1]], rows[row]))
        assert layout.rows.row_of_pair.tolist() == by_token
        starts = [sum(t < token and wanted[t][g] for t, g in rows) for token in range(tokens)]
        assert layout.rows.bag_offsets.tolist() == starts
    for (token, group), slots in zip(rows, layout.slot_expert.tolist(), strict=True):
        chosen = [e for e in range(local) if seen_TE[token, group * local + e]]
        assert slots == (chosen + [local] * len(slots))[: len(slots)]
    kept = layout.map_TE
    assert kept is not None and torch.equal(kept, seen_TE), "sums over a token's rows read it"


def test_gradients_of_experts_of_closed_groups_are_zero() -> None:
    """They come from the chunk that those groups are part of, to be added to these."""
    map_TE = routed()
    layout, told = bounded_groups(map_TE, TOPK, [45, None, 44, 50])
    assert not told[0]
    row = SlotRow(hidden=HIDDEN, slots=layout.num_slots, wire=torch.float32)
    payload = PackOnce(layout, row).load(torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, EXPERTS) + 1)
    _, dprobs = PackOnce(layout, row).unload_grad(payload)
    open_E = torch.tensor([True, True, False, False, True, True, True, True])
    assert dprobs is not None and torch.equal(dprobs != 0, map_TE & open_E)

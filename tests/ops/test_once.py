"""Sending a token once per group of experts: rows, slots, gradients, and how many fewer rows there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_npu.device import kernels_of
from fluid_npu.ops.once import OnceLayout, experts_of_tokens, groups_of_tokens, once_layout
from fluid_npu.ops.payload import wire_dtype
from fluid_npu.ops.payload_once import Arrival, Expand, MergeOnce, PackOnce, Reduce, ReplicateOnce, SlotRow
from fluid_npu.ops.permute import PermuteLayout
from tests.support.device import here, wide

HIDDEN = 6
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
DTYPES += [(torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float16, torch.float32)]


def random_map(tokens: int, experts: int, most: int, seed: int, uneven: bool = False) -> torch.Tensor:
    """A bool map [T, E] with ``most`` experts a token; ``uneven``: from none to ``most``, low numbers preferred."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    if uneven:
        scores -= torch.arange(experts) / experts
    map_TE = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(most)[1], True)
    if uneven:
        map_TE &= torch.rand(tokens, experts, generator=generator) < 0.7
    return map_TE


def layout_of(map_TE: torch.Tensor, most: int, groups: int) -> OnceLayout:
    """As the dispatcher makes it."""
    expert_TK = experts_of_tokens(map_TE, most)
    map_TG = groups_of_tokens(expert_TK, map_TE.shape[1], groups)
    return once_layout(expert_TK, map_TG, map_TE.shape[1], int(map_TG.sum()))


class Exchange:
    """A dispatch of several ranks in one process: every rank's rows go to every group's rank."""

    def __init__(self, maps: list[torch.Tensor], most: int, ranks: int, wire: torch.dtype) -> None:
        self.maps, self.ranks = maps, ranks
        experts = maps[0].shape[1]
        self.layouts = [layout_of(map_TE, most, ranks) for map_TE in maps]
        self.row = SlotRow(hidden=HIDDEN, slots=self.layouts[0].num_slots, wire=wire)
        self.packs = [PackOnce(layout, self.row) for layout in self.layouts]
        local = experts // ranks
        pairs = [sum(int(m[:, rank * local : (rank + 1) * local].sum()) for m in maps) for rank in range(ranks)]
        self.arrivals = [Arrival(expert_rows=rows) for rows in pairs]
        self.splits = [(layout.rows.pair_index % ranks).bincount(minlength=ranks).tolist() for layout in self.layouts]

    def there(self, sent: list[torch.Tensor]) -> list[torch.Tensor]:
        """What each rank receives."""
        parts = [rows.split(splits) for rows, splits in zip(sent, self.splits, strict=True)]
        return [torch.cat([part[rank] for part in parts]) for rank in range(self.ranks)]

    def back(self, sent: list[torch.Tensor]) -> list[torch.Tensor]:
        """The reverse way."""
        parts = [rows.split([splits[rank] for splits in self.splits]) for rank, rows in enumerate(sent)]
        return [torch.cat([part[source] for part in parts]) for source in range(len(self.maps))]


def check_exchange(maps: list[torch.Tensor], most: int, ranks: int, dtype: torch.dtype, probs: torch.dtype) -> None:
    """Rows and probabilities as the plain dispatch brings them; sums and all gradients as autograd of a dense sum."""
    wire, experts = wire_dtype(dtype, probs), maps[0].shape[1]
    maps = [here(m) for m in maps]
    once = Exchange(maps, most, ranks, wire)
    xs = [here(torch.randn(len(m), HIDDEN).to(dtype)) for m in maps]
    ps = [here(torch.rand(m.shape).to(probs)).to(wire) for m in maps]
    received = once.there([pack.load(x, p) for pack, x, p in zip(once.packs, xs, ps, strict=True)])
    expands = [Expand(once.row, arrival) for arrival in once.arrivals]
    unloaded = [expand.unload(rows) for expand, rows in zip(expands, received, strict=True)]
    local = experts // ranks
    for rank, (x_RH, p_R) in enumerate(unloaded):
        mine = range(rank * local, (rank + 1) * local)
        assert torch.equal(x_RH, torch.cat([x[m[:, e]] for e in mine for x, m in zip(xs, maps, strict=True)]))
        assert torch.equal(p_R, torch.cat([p[m[:, e], e] for e in mine for p, m in zip(ps, maps, strict=True)]))
    # Back: the gradients of the rows are the rows themselves, so that each sum is known.
    grads = [expand.load_grad(x, p) for expand, (x, p) in zip(expands, unloaded, strict=True)]
    for x, p, m, pack, rows in zip(xs, ps, maps, once.packs, once.back(grads), strict=True):
        dx, dp = pack.unload_grad(rows)
        close(dx, wide(x) * m.cpu().sum(1, keepdim=True), dtype)
        assert torch.equal(dp, p * m)
    reduced = [Reduce(arrival).load(x) for arrival, (x, _) in zip(once.arrivals, unloaded, strict=True)]
    for x, m, layout, rows in zip(xs, maps, once.layouts, once.back(reduced), strict=True):
        (out,) = MergeOnce(layout, x.shape).unload(rows)
        close(out, wide(x) * m.cpu().sum(1, keepdim=True), dtype)


def close(got: Any, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of at most nine additions of the dtype."""
    error = (wide(got) - want).norm() / want.norm().clamp(min=1e-30)
    assert got.dtype == dtype and error <= 4 * torch.finfo(dtype).eps, float(error)


@settings(max_examples=12)
@given(st.data())
def test_rows_arrive_as_in_plain_form_and_gradients_are_sums(data: st.DataObject) -> None:
    draw_and_check(data)


@pytest.mark.nightly
@settings(max_examples=600)
@given(st.data())
def test_many_random_routings(data: st.DataObject) -> None:
    draw_and_check(data)


def draw_and_check(data: st.DataObject) -> None:
    """Random ranks, experts, top-k, tokens of each rank (none too), evenness and dtypes."""
    ranks = data.draw(st.sampled_from([1, 2, 3, 4]))
    local = data.draw(st.integers(1, 6))
    most = data.draw(st.integers(1, min(8, ranks * local)))
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks))
    uneven, seed = data.draw(st.booleans()), data.draw(st.integers(0, 999))
    dtype, probs = data.draw(st.sampled_from(DTYPES))
    maps = [random_map(t, ranks * local, most, seed + i, uneven) for i, t in enumerate(tokens)]
    check_exchange(maps, most, ranks, dtype, probs)


@pytest.mark.parametrize("which", ["first", "last"])
def test_all_tokens_to_experts_of_one_rank(which: str) -> None:
    map_TE = torch.zeros(7, 8, dtype=torch.bool)
    map_TE[:, slice(0, 4) if which == "first" else slice(4, 8)] = True
    check_exchange([map_TE, map_TE], 4, 2, torch.float32, torch.float32)
    layout = layout_of(map_TE, 4, 2)
    assert layout.rows.num_rows == 7, "four experts of one rank: one row, not four"


def test_rows_are_by_group_and_then_token_with_slots_that_ascend() -> None:
    map_TE = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    layout = layout_of(map_TE, 3, 2)
    assert layout.rows.token_of_row.tolist() == [0, 3, 0, 1]
    assert layout.slot_expert.tolist() == [[0, 2], [0, 1], [0, 1], [0, 2]], "2 stands for no expert"
    assert layout.slot_pair.tolist() == [[0, 16], [12, 13], [2, 3], [6, 16]]


def test_the_next_hop_is_found_from_the_slots_of_the_first() -> None:
    """Once per node and then once per rank gives the rows of once per rank."""
    map_TE = random_map(20, 16, 5, 4)
    per_node = layout_of(map_TE, 5, 2)
    node_rows = (per_node.rows.pair_index % 2).bincount(minlength=2).tolist()
    direct = layout_of(map_TE, 5, 4)
    reached: dict[int, list[tuple[int, list[int]]]] = {}
    for node, (slots, tokens) in enumerate(
        zip(per_node.slot_expert.split(node_rows), per_node.rows.token_of_row.split(node_rows), strict=True)
    ):
        inside = groups_of_tokens(slots, 8, 2)
        hop = once_layout(slots, inside, 8, int(inside.sum()))
        for row, group, experts in zip(
            hop.rows.token_of_row.tolist(), (hop.rows.pair_index % 2).tolist(), hop.slot_expert.tolist(), strict=True
        ):
            reached.setdefault(2 * node + group, []).append((int(tokens[row]), [e for e in experts if e < 4]))
    want: dict[int, list[tuple[int, list[int]]]] = {}
    for token, group, experts in zip(
        direct.rows.token_of_row.tolist(),
        (direct.rows.pair_index % 4).tolist(),
        direct.slot_expert.tolist(),
        strict=True,
    ):
        want.setdefault(group, []).append((token, [e for e in experts if e < 4]))
    assert reached == want


def test_replicas_sum_probabilities_as_numbers_and_not_as_bits() -> None:
    layout = layout_of(here(random_map(7, 8, 3, 1)), 3, 2)
    row = SlotRow(hidden=HIDDEN, slots=layout.num_slots, wire=torch.float32)
    payload = PackOnce(layout, row).load(here(torch.randn(7, HIDDEN).bfloat16()), here(torch.rand(7, 8)))
    replicate = ReplicateOnce(2, row)
    # As integers: half of a probability may look like a NaN.
    assert torch.equal(replicate.load(payload).view(torch.int16), payload.repeat(2, 1).view(torch.int16))
    grads = [torch.empty_like(payload) for _ in range(2)]
    ps = [here(torch.randn(layout.rows.num_rows, row.slots)) for _ in grads]
    for grad, p in zip(grads, ps, strict=True):
        grad[:, :HIDDEN] = 1.0
        row.write(grad, p, None)
    (total,) = replicate.unload_grad(torch.cat(grads))
    assert total is not None and total.shape == payload.shape
    assert torch.equal(row.read_probs(total), ps[0] + ps[1])
    assert torch.equal(total[:, :HIDDEN], torch.full_like(total[:, :HIDDEN], 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    map_TE = torch.ones(40, 8, dtype=torch.bool)
    layout = PermuteLayout.from_slots(here(experts_of_tokens(map_TE, 8)), 320)
    rows = here(torch.randn(320, HIDDEN).to(dtype))
    by_token = rows.view(8, 40, HIDDEN).float()
    want = by_token[0]
    for expert in range(1, 8):
        want = want + by_token[expert]
    assert torch.equal(kernels_of(rows).sum_rows(rows, layout), want.to(dtype))


def test_combine_before_the_dispatch_arrived_is_said() -> None:
    with pytest.raises(RuntimeError, match="combine before the dispatch has arrived"):
        Reduce(Arrival(expert_rows=3)).load(torch.zeros(3, HIDDEN))


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize(("dtype", "wire"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_payload_rows_are_multiples_of_16_bytes_wider(slots: int, dtype: torch.dtype, wire: torch.dtype) -> None:
    row = SlotRow(hidden=HIDDEN, slots=slots, wire=wire)
    extra = (row.width(dtype) - HIDDEN) * dtype.itemsize
    assert extra % 16 == 0 and extra >= 2 * slots * wire.itemsize


def test_from_slots_is_the_layout_of_the_map() -> None:
    map_TE = here(random_map(9, 5, 3, 2, uneven=True))
    slots = PermuteLayout.from_slots(experts_of_tokens(map_TE, 3), int(map_TE.sum()))
    direct = PermuteLayout.from_routing_map(map_TE)
    for name in ("token_of_row", "row_of_pair", "bag_offsets"):
        assert torch.equal(getattr(slots, name), getattr(direct, name)), name
    assert slots.experts_TK is None, "slots are not experts"

"""The messages of an AllToAll in two legs, played through for all ranks in one process."""

from __future__ import annotations

import pytest

from fluid_npu.comm.transports.nodes import Nodes, nodes_of
from fluid_npu.comm.transports.two_level import TwoLevelTransport
from fluid_npu.comm.transports.two_level_plan import Copy, Leg, Order, Piece, TwoLegs, better_order, plan_legs
from tests.support.exchanges import Table, even, tables

Row = tuple[int, int, int]  # who sends it, to whom, and its number among those
Memory = dict[str, list[Row | None]]
_GRIDS = [(2, 2), (3, 2), (2, 3), (4, 1), (1, 4), (2, 4)]


def _memory(table: Table, own: int, legs: TwoLegs) -> Memory:
    source = [(own, target, row) for target, rows in enumerate(table[own]) for row in range(rows)]
    return {
        "source": list(source),
        "middle": [None] * legs.middle_rows,
        "output": [None] * sum(row[own] for row in table),
    }


def _read(memory: Memory, piece: Piece) -> list[Row | None]:
    rows = memory[piece.buffer][piece.start : piece.start + piece.rows]
    assert len(rows) == piece.rows and None not in rows, "rows are sent before they are there"
    return rows


def _write(memory: Memory, piece: Piece, rows: list[Row | None]) -> None:
    assert memory[piece.buffer][piece.start : piece.start + piece.rows] == [None] * len(rows), "written twice"
    assert piece.rows == len(rows), "the two ends do not agree on the size of a message"
    memory[piece.buffer][piece.start : piece.start + piece.rows] = rows


def _deliver(memories: list[Memory], legs: list[Leg]) -> int:
    """Messages of a pair arrive in the order in which they were sent; returns how many had rows."""
    under_way = {}
    for own, leg in enumerate(legs):
        for piece in leg.sends:
            under_way.setdefault((own, piece.peer), []).append(_read(memories[own], piece))
    for own, leg in enumerate(legs):
        for piece in leg.receives:
            _write(memories[own], piece, under_way[piece.peer, own].pop(0))
    assert not any(under_way.values()), "a message that nobody receives"
    return sum(bool(piece.rows) for leg in legs for piece in leg.sends)


def _copy(memory: Memory, copies: list[Copy]) -> None:
    for copy in copies:
        _write(memory, copy.target, _read(memory, copy.source))


def _played(table: Table, nodes: Nodes, order: Order | None) -> tuple[list[Memory], list[TwoLegs]]:
    plans = [plan_legs(table, nodes, own, order) for own in range(len(table))]
    memories = [_memory(table, own, plan) for own, plan in enumerate(plans)]
    for memory, plan in zip(memories, plans, strict=True):
        _copy(memory, plan.before)
    _deliver(memories, [plan.first for plan in plans])
    _deliver(memories, [plan.second for plan in plans])
    for memory, plan in zip(memories, plans, strict=True):
        _copy(memory, plan.after)
    return memories, plans


@pytest.mark.parametrize("order", ["across first", "inside first"])
@pytest.mark.parametrize(("count", "size"), _GRIDS)
def test_every_row_comes_once_and_in_the_order_of_the_sources(count: int, size: int, order: Order) -> None:
    nodes = Nodes(count=count, size=size)
    for table in [even(count * size, 2), *tables(count * size, 12, seed=9, most=4)]:
        memories, _ = _played(table, nodes, order)
        for own, memory in enumerate(memories):
            expected = [(source, own, row) for source, rows in enumerate(table) for row in range(rows[own])]
            assert memory["output"] == expected


@pytest.mark.parametrize("order", ["across first", "inside first"])
def test_only_ranks_of_equal_place_talk_across_and_each_row_crosses_once(order: Order) -> None:
    nodes, table = Nodes(count=3, size=2), tables(6, 1, seed=2)[0]
    _, plans = _played(table, nodes, order)
    for own, plan in enumerate(plans):
        for piece in (*plan.first.sends, *plan.second.sends):
            assert piece.peer // 2 == own // 2 or piece.peer % 2 == own % 2
    sent = [plan.rows_sent(own, nodes) for own, plan in enumerate(plans)]
    apart = [(s, t) for s in range(6) for t in range(6) if s // 2 != t // 2]
    assert sum(across for _, across in sent) == sum(table[s][t] for s, t in apart)
    beside = [(s, t) for s in range(6) for t in range(6) if s // 2 == t // 2 and s != t]
    relayed = sum(table[s][t] for s, t in apart if s % 2 != t % 2)
    assert sum(inside for inside, _ in sent) == sum(table[s][t] for s, t in beside) + relayed


def test_the_order_is_the_one_that_spreads_the_load_over_the_cards() -> None:
    nodes = Nodes(count=2, size=2)
    hot_target = [[1, 1, 1, 9] for _ in range(4)]
    hot_source = [list(column) for column in zip(*hot_target, strict=True)]
    assert better_order(hot_target, nodes) == "across first"
    assert better_order(hot_source, nodes) == "inside first"
    beside = [list(row) for row in hot_source]
    beside[0][1] = 100  # stays on its node
    assert better_order(beside, nodes) == "inside first"
    assert better_order(even(4, 3), nodes) == "across first"
    assert better_order([[9, 9, 0, 0], [9, 9, 0, 0], [0, 0, 9, 9], [0, 0, 9, 9]], nodes) == "across first"
    busiest = {}
    for order in ("across first", "inside first"):
        _, plans = _played(hot_target, nodes, order)
        busiest[order] = max(plan.rows_sent(own, nodes)[1] for own, plan in enumerate(plans))
    assert busiest == {"across first": 10, "inside first": 18}


@pytest.mark.parametrize("order", ["across first", "inside first"])
def test_rows_that_need_one_leg_wait_nowhere(order: Order) -> None:
    """As those of a dispatch that goes by nodes: from their rank, and to it, without a copy."""
    nodes = Nodes(count=3, size=2)
    for far in (True, False):
        pairs = [[s % 2 == t % 2 if far else s // 2 == t // 2 for t in range(6)] for s in range(6)]
        table = [[(1 + s + t) * pair for t, pair in enumerate(row)] for s, row in enumerate(pairs)]
        memories, plans = _played(table, nodes, order)
        assert all(None not in memory["output"] for memory in memories)
        assert not any(plan.middle_rows for plan in plans)
        assert all(piece.source.peer == own for own, plan in enumerate(plans) for piece in (*plan.before, *plan.after))
        assert sum(len(plan.before) + len(plan.after) for plan in plans) == 6, "own rows alone"


def test_plans_are_kept_by_their_table_and_do_not_grow() -> None:
    nodes, transport = Nodes(count=2, size=2), TwoLevelTransport(2)
    steps = tables(4, 300, seed=3)
    for table in steps:
        there = transport.planned(table, nodes, 1, "group")
        back = [list(column) for column in zip(*table, strict=True)]
        assert transport.planned(back, nodes, 1, "group") == plan_legs(back, nodes, 1)
        assert transport.planned([list(row) for row in table], nodes, 1, "group") is there
        assert transport.planned(table, nodes, 1, "other group") is not there
        assert there == plan_legs(table, nodes, 1)
    assert len(transport.plans) == 256
    assert transport.planned(steps[-1], nodes, 1, "group") is there, "the newest are kept"
    transport.close()
    assert not transport.plans


def test_nodes_are_found_in_groups_that_skip_ranks() -> None:
    assert nodes_of(range(8), 4).value == Nodes(count=2, size=4)
    assert nodes_of([0, 2, 4, 6], 4).value == Nodes(count=2, size=2)
    assert nodes_of([0, 4], 4).value == Nodes(count=2, size=1)
    assert not nodes_of([0, 1], 4).value.two_levels
    assert "3 on node 0, 1 on node 1: as many on each" in nodes_of([0, 1, 2, 4], 4).reason
    assert "does not have the ranks of a node in a row" in nodes_of([0, 4, 1, 5], 4).reason

"""AllToAll in two legs between four processes as two nodes of two: right bytes, an order that holds, no hang."""

from __future__ import annotations

import io
import os
import time
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu.comm.all_to_all import Peers, Route, fluid_all_to_all, start_exchange
from fluid_npu.comm.guard import CollectiveError
from fluid_npu.comm.sink import DirectSink
from fluid_npu.comm.transports import DelayedTransport, TwoLevelTransport, choose
from fluid_npu.comm.transports.choose import TransportUnavailable, choose_transport
from fluid_npu.comm.transports.two_level import FirstLeg, HostLegs
from fluid_npu.device import get_device
from fluid_npu.order.checker import Report, check
from fluid_npu.order.patching import Patches
from fluid_npu.order.recorder import OrderRecorder
from fluid_npu.order.records import Entry
from tests.support.exchanges import Exchange, Table, even, tables
from tests.support.ranks import RankError, run_ranks

_CPU = get_device("cpu").value


def _many_shapes() -> list[str]:
    """What went wrong, with up to three exchanges under way, in two groups."""
    world, group, other = dist.get_world_size(), dist.group.WORLD, dist.new_group()
    transport, wrong = TwoLevelTransport(2), []
    assert transport.prepare(group).value
    if not Exchange(transport, group, even(world, 5), 0, lists=False).ok():
        wrong.append("equal splits")
    if not Exchange(transport, group, even(world, 0), 1).ok():
        wrong.append("empty")
    steps = tables(world, 18, seed=5)
    for at in range(0, 18, 3):
        flights = []
        for step in range(at, at + 3):
            dtype = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)[step % 4]
            where = other if step % 5 == 0 else group
            flights.append(Exchange(transport, where, steps[step], step, width=(1, 33, 257)[step % 3], dtype=dtype))
            if dist.get_rank() == step % world:
                time.sleep(0.005)  # ranks drift apart
        wrong += [f"step {at + number}" for number, flight in reversed([*enumerate(flights)]) if not flight.ok()]
    transport.close()
    return wrong


def _route(table: Table, comm_type: str = "moe_dispatch", known: bool = True) -> Route:
    index = dist.get_rank()
    splits = {"output_splits": [row[index] for row in table], "input_splits": table[index]}
    return Route(peers=Peers.of(dist.group.WORLD), comm_type=comm_type, table=table if known else None, **splits)


def _counted() -> dict[str, Any]:
    """Bytes of each leg behind a delay, there and back, and what an exchange without a table says."""
    table = [[1, 2, 3, 4], [0, 0, 5, 0], [2, 2, 2, 2], [0, 7, 0, 0]]
    sink = DirectSink(transport=DelayedTransport(TwoLevelTransport(2), 1.0))
    x = torch.randn(sum(table[dist.get_rank()]), 2, requires_grad=True)
    start_exchange(_route(table), [x * 2], sink=sink).wait().sum().backward()
    found: dict[str, Any] = {"stats": sink.comm.as_dict(), "grad": torch.equal(x.grad, torch.full_like(x, 2.0))}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for _ in range(2):
            start_exchange(_route(table, known=False), [x], sink=sink).wait()
    return {**found, "printed": printed.getvalue(), "after": sink.comm.as_dict()}


def _asked() -> dict[str, tuple[str, str]]:
    """(transport, reason or error) of ``choose_transport``."""

    def ask(wanted: str, groups: list[Any] | None = None, **more: Any) -> tuple[str, str]:
        try:
            chosen = choose_transport(wanted, groups or [dist.group.WORLD], _CPU, **more)
        except (TransportUnavailable, ValueError) as error:
            return type(error).__name__, str(error)
        choose.close(chosen.value)
        return chosen.value.name, chosen.reason

    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with redirect_stdout(io.StringIO()):
        found = {
            "two nodes": ask("two-level", node_size=2),
            "beside a group on one node": ask("two-level", [dist.group.WORLD, pairs[rank // 2]], node_size=2),
            "one node": ask("two-level", node_size=4),
            "nodes of one": ask("two-level", node_size=1),
            "no whole nodes": ask("two-level", node_size=3),
            "not agreed": ask("two-level", node_size=2 if rank < 3 else 4),
            "nobody says": ask("two-level"),
        }
        choose.measure = lambda ready, *_: {name: {1: _cost(name)} for name in ready}
        found["auto"] = ask("auto", node_size=2)
        found["auto on one node"] = ask("auto")
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        found["the launcher says"] = ask("two-level")
        os.environ["LOCAL_WORLD_SIZE"] = "2" if rank else "3"
        found["launchers differ"] = ask("two-level")
        found["auto, launchers differ"] = ask("auto")
        legs = FirstLeg.finish
        if rank == 2:
            FirstLeg.finish = lambda self: (self.buffers["output"].zero_(), legs(self))  # type: ignore[method-assign]
        found["wrong data on rank 2"] = ask("two-level", node_size=2)
        FirstLeg.finish = legs  # type: ignore[method-assign]
    return found


def _cost(name: str) -> Any:
    return choose.Cost(alone_ms=1.0 if name == "two-level" else 9.0, exposed_ms=0.0)


def _recorded(spoil: Any) -> list[Entry]:
    patches, transport = Patches(), TwoLevelTransport(2)
    with OrderRecorder() as recorder:
        spoil(patches)
        for table in ([[3] * 4] * 4, [[1, 2, 3, 4], [0, 0, 5, 0], [2, 2, 2, 2], [0, 7, 0, 0]], [[0, 0, 0, 6]] * 4):
            x = torch.randn(sum(table[dist.get_rank()]), 4, requires_grad=True)
            there = start_exchange(_route(table), [x * 2], sink=DirectSink(transport=transport)).wait()
            back = _route(table).reversed("moe_combine")
            start_exchange(back, [there * 3], sink=DirectSink(transport=transport)).wait().sum().backward()
        patches.undo()
    dist.barrier()
    return recorder.entries


_KEPT: list[Any] = []  # gloo gives a message up whose Work is gone


def _no_wait_for_the_first_leg(patches: Patches) -> None:
    def careless(follow: Any) -> Any:
        def call(legs: HostLegs, lane: Any) -> Any:
            _KEPT.append(legs.begun.first)
            legs.begun.first = []
            return follow(legs, lane)

        return call

    patches.wrap(HostLegs, "follow", careless)


def _read_before_the_wait(patches: Patches) -> None:
    def early(wait: Any) -> Any:
        def call(legs: HostLegs) -> None:
            legs.begun.buffers["output"].clone()
            wait(legs)

        return call

    patches.wrap(HostLegs, "wait", early)


SPOILT = {
    "nothing": lambda patches: None,
    "no wait for the first leg": _no_wait_for_the_first_leg,
    "rows read before the wait": _read_before_the_wait,
}


def _everything() -> dict[str, Any]:
    """All that lives, so that processes start once."""
    return {
        "wrong": _many_shapes(),
        "counted": _counted(),
        "asked": _asked(),
        "records": {name: _recorded(spoil) for name, spoil in SPOILT.items()},
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(4, _everything)


def test_uneven_and_empty_exchanges_arrive_whole(ranks: list[dict[str, Any]]) -> None:
    assert [rank["wrong"] for rank in ranks] == [[]] * 4


def test_bytes_are_counted_for_each_leg(ranks: list[dict[str, Any]]) -> None:
    row = 2 * 4
    for number, found in enumerate(ranks):
        assert found["counted"]["grad"]
        stats = found["counted"]["stats"]
        # Across nodes each row goes once; the way back has the same rows.
        assert {name for name in stats if name.startswith("a2a") and "node" in name} == {
            "a2a_inside_node_bytes",
            "a2a_across_nodes_bytes",
        }, number
    total = sum(rank["counted"]["stats"]["a2a_across_nodes_bytes"] for rank in ranks)
    assert total == 2 * row * (3 + 4 + 5 + 2 + 2 + 7)
    inside = sum(rank["counted"]["stats"]["a2a_inside_node_bytes"] for rank in ranks)
    assert inside == 2 * row * ((2 + 2 + 0 + 0) + (4 + 5 + 2 + 0))  # own node's rows, and what changes its place


def test_an_exchange_without_a_table_takes_the_collective_and_says_so_once(ranks: list[dict[str, Any]]) -> None:
    said = "two-level in the group of ranks [0, 1, 2, 3]: collective (the exchange has no table of all ranks' rows)\n"
    assert ranks[0]["counted"]["printed"] == said
    before, after = ranks[1]["counted"]["stats"], ranks[1]["counted"]["after"]
    assert after["a2a_count"] == before["a2a_count"] + 2
    assert after["a2a_across_nodes_bytes"] == before["a2a_across_nodes_bytes"]


def test_it_is_taken_or_refused_with_the_reason_on_all_ranks_alike(ranks: list[dict[str, Any]]) -> None:
    asked = ranks[0]["asked"]
    assert all(rank["asked"] == asked for rank in ranks)
    assert asked["two nodes"] == ("two-level", "--a2a-transport two-level; 2 nodes of 2 ranks, self-check passed")
    assert asked["beside a group on one node"][0] == "two-level"
    assert asked["the launcher says"][0] == "two-level"
    refused = {
        "one node": "with 4 ranks a node there is one node (--a2a-node-size); use --a2a-transport collective or auto",
        "nodes of one": "with 1 ranks a node there is 4 nodes with one rank each (--a2a-node-size)",
        "no whole nodes": "--a2a-node-size is 3: 4 ranks are not whole nodes of so many; give --a2a-node-size with a",
        "not agreed": "--a2a-node-size is 2 on rank 0 and 4 on rank 3: give --a2a-node-size with the ranks of a node",
        "nobody says": "no group has ranks inside and across nodes: with 4 ranks a node there is one node",
        "launchers differ": "LOCAL_WORLD_SIZE is 3 on rank 0 and 2 on rank 1: give --a2a-node-size",
        "wrong data on rank 2": "self-check on rank 2 of the group: wrong data in exchange 0",
    }
    for case, text in refused.items():
        assert asked[case][0] in ("TransportUnavailable", "ValueError") and text in asked[case][1], case


def test_auto_weighs_it_where_there_are_two_levels(ranks: list[dict[str, Any]]) -> None:
    asked = ranks[0]["asked"]
    assert asked["auto"][0] == "two-level"
    assert asked["auto on one node"][0] != "two-level"
    assert "two-level: no group has ranks inside and across nodes" in asked["auto on one node"][1]
    assert "two-level: LOCAL_WORLD_SIZE is 3 on rank 0" in asked["auto, launchers differ"][1]


def _report(ranks: list[dict[str, Any]], name: str) -> Report:
    return check({rank: found["records"][name] for rank, found in enumerate(ranks)})


def test_the_order_of_both_legs_holds(ranks: list[dict[str, Any]]) -> None:
    report = _report(ranks, "nothing")
    assert report.clean, report.findings[0]


@pytest.mark.parametrize(
    ("spoilt", "found"),
    [
        ("no wait for the first leg", ("read-before-write", "recv", "send")),
        ("rows read before the wait", ("read-before-write", "recv", "aten::clone")),
    ],
)
def test_a_wait_that_is_left_out_is_found(spoilt: str, found: tuple[str, str, str], ranks: Any) -> None:
    findings = _report(ranks, spoilt).findings
    assert found in {(item.kind, item.first.name, item.second.name) for item in findings}, findings[:1]


def _one_rank_dies() -> str:
    group, x = dist.group.WORLD, torch.ones(8, 3)
    sink = DirectSink(transport=TwoLevelTransport(2))
    fluid_all_to_all(group, x, None, None, sink=sink)
    if dist.get_rank() == 3:
        os._exit(0)
    fluid_all_to_all(group, x, None, None, sink=sink)
    return "not seen"


def test_the_death_of_a_peer_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(4, _one_rank_dies, grace=60)
    text = str(caught.value)
    assert CollectiveError.__name__ in text and "moe_dispatch AllToAll" in text and "waited for rank" in text

"""Peer copies between processes, recorded: the protocol is clean, and the checker misses each wait that is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu.comm.all_to_all import Peers, Route, start_exchange
from fluid_npu.comm.sink import DirectSink
from fluid_npu.comm.transports.peer_copy import PeerLanding
from fluid_npu.comm.transports.peer_host import HostCopies, HostPeerMemory
from fluid_npu.comm.transports.peer_memory import Counter, Lane
from fluid_npu.comm.transports.peer_open import peer_copy_transport
from fluid_npu.order.checker import Report, check
from fluid_npu.order.patching import Patches
from fluid_npu.order.recorder import OrderRecorder
from fluid_npu.order.records import Entry
from tests.support.exchanges import Exchange, even, tables
from tests.support.ranks import run_ranks

Spoil = Callable[[Patches], None]


def _without(counter: Counter) -> Spoil:
    """Nobody waits for this counter any more."""

    def make(wait: Any) -> Any:
        def ignoring(memory: Any, lane: Lane, peer: int, kind: Counter, count: int) -> None:
            if kind is not counter:
                wait(memory, lane, peer, kind, count)

        return ignoring

    return lambda patches: patches.wrap(HostPeerMemory, "wait_until", make)


def _told_too_early(patches: Patches) -> None:
    """A receiver frees a slot before it copies out of it."""
    delayed: list[Any] = []

    def late(take: Any) -> Any:
        return lambda *arguments: delayed.append(lambda: take(*arguments))

    def early(tell: Any) -> Any:
        def call(memory: Any, lane: Lane, peer: int, counter: Counter, count: int) -> None:
            tell(memory, lane, peer, counter, count)
            while delayed and counter is Counter.FREED:
                delayed.pop()()

        return call

    patches.wrap(HostPeerMemory, "take", late)
    patches.wrap(HostPeerMemory, "tell", early)


def _read_before_the_wait(patches: Patches) -> None:
    patches.wrap(HostCopies, "wait", lambda wait: lambda copies: None)


def _released_before_it_is_read(patches: Patches) -> None:
    def careless(wait: Any) -> Any:
        def call(landing: PeerLanding) -> None:
            wait(landing)
            landing.release()
            landing.release = lambda: None  # type: ignore[method-assign]

        return call

    patches.wrap(PeerLanding, "wait", careless)


_REMOTE, _EARLY = "remote-write-in-use", "read-before-write"
#: What is spoilt, and what is found then: its kind, and which two operations have no order.
SPOILT: dict[str, tuple[Spoil, tuple[str, str, str]]] = {
    "nothing": (lambda patches: None, ("", "", "")),
    "no wait for a free slot": (_without(Counter.FREED), (_REMOTE, "peer-copy take", "peer-copy put")),
    "no wait for arrival": (_without(Counter.ARRIVED), (_REMOTE, "peer-copy take", "peer-copy put")),
    "a slot freed too early": (_told_too_early, (_REMOTE, "peer-copy take", "peer-copy put")),
    "no wait for a landing": (_without(Counter.LANDED), (_REMOTE, "aten::clone", "peer-copy put")),
    "no wait for a released area": (_without(Counter.RELEASED), (_REMOTE, "aten::clone", "peer-copy put")),
    "an area released too early": (_released_before_it_is_read, (_REMOTE, "aten::clone", "peer-copy put")),
    "rows of the ring read before the wait": (_read_before_the_wait, (_EARLY, "peer-copy take", "aten::clone")),
}


def _recorded(spoil: Spoil) -> list[Entry]:
    world, group = dist.get_world_size(), dist.group.WORLD
    transport = peer_copy_transport("cpu", ring_bytes=2 * 4096, slots=2, landing_bytes=16 << 10)
    assert transport.prepare(group).value
    patches = Patches()
    with OrderRecorder() as recorder:
        spoil(patches)
        for step, table in enumerate(tables(world, 8, seed=4, most=60)):
            Exchange(transport, group, table, step, width=32, lands=step % 3 > 0).ok()
        for step in range(4):  # rank 0 only sends: nothing that it receives tells it that an area is free
            table = [[1] * world, *([0] * world for _ in range(world - 1))]
            Exchange(transport, group, table, step, lands=True).ok()
        for flight in [Exchange(transport, group, even(world, 4), step, lands=True) for step in range(3)]:
            flight.ok()
        patches.undo()
    dist.barrier()
    transport.close()
    return recorder.entries


def _all_recorded() -> dict[str, list[Entry]]:
    return {name: _recorded(spoil) for name, (spoil, _) in SPOILT.items()}


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    records = run_ranks(3, _all_recorded)
    return {name: check({rank: of_rank[name] for rank, of_rank in enumerate(records)}) for name in SPOILT}


def test_the_protocol_is_clean(reports: dict[str, Report]) -> None:
    report = reports["nothing"]
    assert report.clean, report.findings[0]
    assert report.counts["signal"] and report.counts["await"]


@pytest.mark.parametrize("spoilt", [name for name in SPOILT if name != "nothing"])
def test_each_wait_of_the_protocol_is_missed_when_it_is_left_out(spoilt: str, reports: dict[str, Report]) -> None:
    findings = reports[spoilt].findings
    assert SPOILT[spoilt][1] in {(found.kind, found.first.name, found.second.name) for found in findings}, findings[:1]


def _differentiable() -> list[Entry]:
    """Forward and backward of two exchanges after each other, as a layer has them."""
    group, index = dist.group.WORLD, dist.get_rank()
    table = [[2, 3], [0, 4]]
    transport = peer_copy_transport("cpu", landing_bytes=4096)
    assert transport.prepare(group).value
    x = torch.randn(sum(table[index]), 8, requires_grad=True)
    with OrderRecorder() as recorder:
        route = Route(
            peers=Peers.of(group),
            output_splits=[row[index] for row in table],
            input_splits=table[index],
            comm_type="moe_dispatch",
            table=table,
        )
        for _ in range(3):
            there = start_exchange(route, [x * 2], sink=DirectSink(transport=transport)).wait()
            back = start_exchange(
                route.reversed("moe_combine"), [there * 3], sink=DirectSink(transport=transport)
            ).wait()
            back.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 18.0))
    return recorder.entries


def test_forward_and_backward_through_landing_areas_are_clean() -> None:
    report = check(dict(enumerate(run_ranks(2, _differentiable))))
    assert report.clean, report.findings[0]
    assert report.counts["signal"] >= 12

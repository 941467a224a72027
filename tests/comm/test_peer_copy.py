"""The peer-copy protocol between real processes, over shared memory: right bytes, bounded windows, no hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from fluid_npu.comm.all_to_all import Peers, Route, fluid_all_to_all, start_exchange
from fluid_npu.comm.guard import CollectiveError
from fluid_npu.comm.sink import DirectSink
from fluid_npu.comm.transports.peer_copy import PeerCopyTransport
from fluid_npu.comm.transports.peer_memory import WindowSize
from fluid_npu.comm.transports.peer_open import peer_copy_transport, window_size
from tests.support.exchanges import Exchange, even, tables
from tests.support.ranks import run_ranks


def _small(landing_bytes: int = 0) -> PeerCopyTransport:
    """Rings of two slots of a page for each peer of four ranks: most messages go through them in several turns."""
    return peer_copy_transport("cpu", ring_bytes=3 * 2 * 4096, slots=2, landing_bytes=landing_bytes)


def _many_shapes() -> list[bool]:
    world, group = dist.get_world_size(), dist.group.WORLD
    transport = _small()
    assert transport.prepare(group).value
    good = [Exchange(transport, group, even(world, 5), 0, lists=False).ok()]
    good.append(Exchange(transport, group, even(world, 0), 1).ok())
    for step, table in enumerate(tables(world, 8, seed=5)):
        dtype = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)[step % 4]
        good.append(Exchange(transport, group, table, step, width=(1, 33, 257)[step % 3], dtype=dtype).ok())
    # 300 rows of 4 KiB for each pair: 75 times a slot.
    good.append(Exchange(transport, group, even(world, 300), 9, width=1024).ok())
    transport.close()
    return good


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_empty_hot_and_long_messages_arrive_whole(world: int) -> None:
    for good in run_ranks(world, _many_shapes):
        assert all(good), good


def _flights_that_overlap() -> bool:
    """Up to three exchanges under way, landed out of order, in two groups at once."""
    world, group, other = dist.get_world_size(), dist.group.WORLD, dist.new_group()
    transport = _small()
    steps = tables(world, 12, seed=7)
    for at in range(0, 12, 3):
        flights = [
            Exchange(transport, other if step % 2 else group, steps[step], step, width=300)
            for step in range(at, at + 3)
        ]
        if not all(flight.ok() for flight in reversed(flights)):
            return False
    return True


def test_several_exchanges_are_under_way_at_once() -> None:
    assert run_ranks(2, _flights_that_overlap) == [True, True]


def _landings() -> list[str]:
    """Exchanges that land, some too large for an area, some begun while both areas are held; what went wrong."""
    world, group, wrong = dist.get_world_size(), dist.group.WORLD, []
    transport = _small(landing_bytes=20 << 10)
    how = []
    for step, table in enumerate(tables(world, 24, seed=13)):
        dtype = (torch.float32, torch.bfloat16, torch.int64)[step % 3]
        exchange = Exchange(transport, group, table, step, width=16, dtype=dtype, lands=True)
        most = max(sum(column) for column in zip(*table, strict=True)) * 16 * dtype.itemsize
        how.append(exchange.landed)
        if exchange.landed != (most <= 20 << 10) or not exchange.ok():
            wrong.append(f"step {step}")
    if len(set(how)) < 2:
        wrong.append("all went the same way")
    for step in range(0, 24, 4):
        flights = [Exchange(transport, group, even(world, at), step + at, width=8, lands=True) for at in range(1, 5)]
        if [flight.landed for flight in flights] != [True, True, False, False]:
            wrong.append(f"flights from {step}")
        wrong += [f"flight {at} from {step}" for at, flight in enumerate(flights) if not flight.ok()]
    transport.close()
    return wrong


@pytest.mark.parametrize("world", [2, 3])
def test_rows_land_where_they_are_read_unless_they_do_not_fit(world: int) -> None:
    assert run_ranks(world, _landings) == [[]] * world


def _kept_results() -> bool:
    """An unloading that returns the received rows themselves: the results of earlier exchanges stay as they were."""
    group, index, table = dist.group.WORLD, dist.get_rank(), [[2, 3], [1, 4]]
    incoming, sink = [row[index] for row in table], DirectSink(transport=_small(landing_bytes=8 << 10))
    route = Route(
        peers=Peers.of(group), output_splits=incoming, input_splits=table[index], comm_type="moe_dispatch", table=table
    )
    results, copies = [], []
    for step in range(6):
        results.append(start_exchange(route, [torch.full((sum(table[index]), 9), float(step))], sink=sink).wait())
        copies.append(results[-1].clone())
    return all(torch.equal(result, copy) for result, copy in zip(results, copies, strict=True))


def test_what_was_received_does_not_change_when_its_area_is_used_again() -> None:
    assert run_ranks(2, _kept_results) == [True, True]


def _back_to_back(steps: int) -> tuple[bool, int, int]:
    """Exchanges without any synchronisation between the ranks but their own; returns growth of descriptors, KiB."""
    world, group = dist.get_world_size(), dist.group.WORLD
    transport = _small(landing_bytes=6 << 10)
    planned = tables(world, steps, seed=3, most=20)
    good, before = True, (0, 0)
    for step, table in enumerate(planned):
        if step == steps // 2:
            before = _held()
        if dist.get_rank() == step % world and step % 50 == 0:
            time.sleep(0.01)  # ranks drift apart
        good &= Exchange(transport, group, table, step, lands=step % 5 > 0).ok()
    after = _held()
    return good, after[0] - before[0], after[1] - before[1]


def _held() -> tuple[int, int]:
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    return len(os.listdir("/proc/self/fd")), resident


def test_a_thousand_exchanges_in_a_row_are_right_and_nothing_grows() -> None:
    for good, descriptors, kib in run_ranks(2, _back_to_back, 1000):
        assert good
        assert descriptors == 0
        assert kib < 2048


def _one_rank_dies() -> str:
    group = dist.group.WORLD
    sink = DirectSink(transport=peer_copy_transport("cpu"))
    x = torch.ones(4, 3)
    fluid_all_to_all(group, x, [2, 2], [2, 2], sink=sink)
    if dist.get_rank() == 1:
        os._exit(0)
    started = time.monotonic()
    try:
        fluid_all_to_all(group, x, [2, 2], [2, 2], sink=sink)
    except CollectiveError as error:
        raise RuntimeError(f"seen after {time.monotonic() - started:.0f} s: {error}") from None
    return "not seen"


def test_the_death_of_a_peer_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, _one_rank_dies, grace=60)
    text = str(caught.value)
    assert "moe_dispatch AllToAll" in text and "waited for rank 1" in text
    assert "its process has ended" in text


def test_a_window_is_cut_into_slots_for_every_peer() -> None:
    size = window_size(4, ring_bytes=24 << 20, slots=4, landing_bytes=5000)
    assert size == WindowSize(world=4, slots=4, slot_bytes=2 << 20, landing_bytes=8192)
    places = {size.slot(1, writer, slot) for writer in (0, 2, 3) for slot in range(4)}
    assert places == set(range(0, 24 << 20, 2 << 20))
    assert (size.landing(0), size.landing(1), size.total) == (24 << 20, (24 << 20) + 8192, (24 << 20) + 16384)
    with pytest.raises(ValueError, match=r"slots=1: .* give 2 or more"):
        peer_copy_transport("cpu", slots=1)

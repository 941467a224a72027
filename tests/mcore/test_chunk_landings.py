"""Chunks whose rows land in the transport's memory: the same bits, an order without conflicts, areas given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.peer_copy import PeerExchange
from fluid_npu.comm.transports.peer_host import HostPeerMemory
from fluid_npu.comm.transports.peer_memory import Counter, Lane
from fluid_npu.comm.transports.peer_open import peer_copy_transport
from fluid_npu.order.checker import check
from fluid_npu.order.patching import Patches
from fluid_npu.order.recorder import OrderRecorder
from fluid_npu.order.records import Entry
from tests.support.moe import Case, run_layer

Ranks = Callable[..., list[Any]]
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
CASES = [
    Case(overlap="full", chunks=2, micro_batches=2),
    # One expert a chunk: rows are used as they arrived, so what was made of them must move out of the area.
    Case(overlap="full", chunks=4, topk=3, empty_experts=5, micro_batches=2),
    Case(overlap="full", chunks=2, config=PADDED),
    Case(overlap="full", chunks=3, topk=3, dispatch="once-per-rank", micro_batches=2),
    Case(overlap="full", chunks=4, tokens=1, topk=1, micro_batches=2),
]
EXACT = ("router", "fc1", "fc2")


def landing(cases: list[Case], landing_bytes: int) -> list[dict[str, Any]]:
    """Each case over torch's collective and over peer copies, as it is and as its twin, and how many rows landed."""
    landed: list[int] = []
    transport = peer_copy_transport("cpu", ring_bytes=2 * 4096, slots=2, landing_bytes=landing_bytes)
    patches = Patches()
    patches.wrap(PeerExchange, "land", lambda land: lambda *args: landed.append(1) or land(*args))
    found = []
    for case in cases:
        before = len(landed)
        over = replace(case, transport=transport)
        runs = {"collective": run_layer(case), "peer": run_layer(over), "twin": run_layer(replace(over, twin=True))}
        found.append({**runs, "landed": (len(landed) - before) // 2})
    patches.undo()
    dist.barrier()
    transport.close()
    return found


def test_chunks_that_land_give_the_same_bits(run_ranks: Ranks) -> None:
    for rank in run_ranks(2, landing, CASES, 64 << 10, sizes={"expert_model_parallel_size": 2}):
        for case, found in zip(CASES, rank, strict=True):
            # Two areas: the first two dispatches of a forward, and the first two combines of a backward.
            assert found["landed"] == 2 * 2 * case.micro_batches, case
            for other in ("peer", "twin"):
                assert all(torch.equal(found[other][key], found["collective"][key]) for key in EXACT), (case, other)
                for key in ("out", "dx"):
                    assert all(map(torch.equal, found[other][key], found["collective"][key])), (case, other, key)


def test_a_chunk_that_does_not_fit_goes_through_the_ring(run_ranks: Ranks) -> None:
    case = Case(overlap="full", chunks=2, empty_experts=5, micro_batches=2)
    for rank in run_ranks(2, landing, [case], 4096, sizes={"expert_model_parallel_size": 2}):
        found = rank[0]
        assert found["landed"] < 2 * 2 * case.micro_batches
        assert all(torch.equal(found["peer"][key], found["collective"][key]) for key in EXACT)


def recorded(careless: bool) -> list[Entry]:
    """A layer in chunks over peer copies; ``careless``: nobody waits until the rows are there."""
    transport = peer_copy_transport("cpu", ring_bytes=2 * 4096, slots=2, landing_bytes=64 << 10)
    patches = Patches()
    with OrderRecorder() as recorder:
        if careless:
            patches.wrap(HostPeerMemory, "wait_until", _without_landings)
        run_layer(replace(CASES[0], transport=transport, fuse=False))
        patches.undo()
    dist.barrier()
    transport.close()
    return recorder.entries


def _without_landings(wait: Any) -> Any:
    def call(memory: Any, lane: Lane, peer: int, kind: Counter, count: int) -> None:
        if kind is not Counter.LANDED:
            wait(memory, lane, peer, kind, count)

    return call


def both_recorded() -> list[list[Entry]]:
    return [recorded(False), recorded(True)]


def test_the_order_is_clean_and_a_wait_that_is_left_out_is_found(run_ranks: Ranks) -> None:
    ranks = run_ranks(2, both_recorded, sizes={"expert_model_parallel_size": 2})
    report, spoilt = (check({rank: entries[which] for rank, entries in enumerate(ranks)}) for which in (0, 1))
    assert report.clean, report.findings[0]
    assert report.counts["signal"]
    assert "peer-copy put" in {found.second.name for found in spoilt.findings if found.kind == "remote-write-in-use"}

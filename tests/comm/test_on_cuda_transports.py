"""Every transport on two GPUs: bitwise what NCCL's AllToAll gives, with even, uneven, empty and back-to-back splits."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu.comm.transports import (
    CollectiveTransport,
    PairwiseTransport,
    carve_out,
    few_ctas_transport,
    high_priority_transport,
)
from fluid_npu.comm.transports.choose import close
from fluid_npu.comm.transports.peer_open import peer_copy_transport
from fluid_npu.device.choice import Choice
from fluid_npu.order.checker import check
from fluid_npu.order.recorder import OrderRecorder
from fluid_npu.order.records import Entry
from tests.support.exchanges import Exchange, even, tables
from tests.support.ranks import RankError, run_ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NAMES = (
    "collective",
    "peer-copy",
    "peer-copy small window",
    "few-ctas",
    "high-priority",
    "high-priority 8",
    "pairwise",
)


def _group() -> Any:
    """An NCCL group beside the gloo group of the test's processes."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return dist.new_group(backend="nccl")


def _make(name: str) -> Any:
    if name == "collective":
        return CollectiveTransport()
    if name == "few-ctas":
        return few_ctas_transport(4)
    if name == "high-priority":
        return high_priority_transport()
    if name == "high-priority 8":
        return high_priority_transport(8)
    if name == "pairwise":
        return PairwiseTransport()
    return peer_copy_transport("cuda", ring_bytes=64 << 10, landing_bytes=1 << 20 if "small" in name else 160 << 20)


def _all_splits(transport: Any, group: Any) -> list[str]:
    """What was wrong, by step."""
    where, world, wrong = torch.device("cuda", torch.cuda.current_device()), dist.get_world_size(), []
    common: dict[str, Any] = {"device": where, "lands": hasattr(transport, "land")}

    def take(what: str, exchange: Exchange) -> None:
        if not exchange.ok():
            wrong.append(what)

    take("even", Exchange(transport, group, even(world, 512), 0, lists=False, width=1024, **common))
    take("empty", Exchange(transport, group, even(world, 0), 1, **common))
    for step, table in enumerate(tables(world, 16, seed=5)):
        dtype = (torch.bfloat16, torch.float32, torch.int64, torch.uint8)[step % 4]
        exchange = Exchange(transport, group, table, step, width=(1, 33, 1024)[step % 3], dtype=dtype, **common)
        take(f"step {step}: {table}", exchange)
    take("8 MiB", Exchange(transport, group, even(world, 2048), 3, width=2048, dtype=torch.bfloat16, **common))
    flights = [Exchange(transport, group, t, i, width=512, **common) for i, t in enumerate(tables(world, 40, seed=9))]
    for index, flight in enumerate(flights):
        take(f"all under way {index}", flight)
    for index, table in enumerate(tables(world, 100, seed=10)):
        take(f"back to back {index}", Exchange(transport, group, table, index, width=512, **common))
    return wrong + _beside_products(transport, group)


def _beside_products(transport: Any, group: Any) -> list[str]:
    """Exchanges whose flight is full of matrix products; buffers are dropped and reused at once."""
    where, world, wrong = torch.device("cuda", torch.cuda.current_device()), dist.get_world_size(), []
    a = torch.randn(4096, 4096, device=where, dtype=torch.bfloat16)
    for step, table in enumerate(tables(world, 16, seed=11, most=100)):
        lands = hasattr(transport, "land")
        exchange = Exchange(transport, group, table, step, width=1024, dtype=torch.bfloat16, device=where, lands=lands)
        with carve_out(8 if transport.name == "few-ctas" else 0):
            for _ in range(3):
                a @ a
        exchange.work.wait()
        del exchange.source
        torch.full((table[0][0] * 1024 + 8,), 7.0, device=where)
        if not exchange.ok():
            wrong.append(f"beside products {step}")
    return wrong


def _recorded(group: Any) -> list[Entry]:
    """A few exchanges through both ways of a window beside products, for the order checker."""
    transport, where = peer_copy_transport("cuda", ring_bytes=64 << 10, landing_bytes=1 << 20), torch.device("cuda")
    transport.prepare(group)
    a = torch.randn(1024, 1024, device=where)
    with OrderRecorder() as recorder:
        for step, table in enumerate(tables(dist.get_world_size(), 8, seed=2)):
            exchange = Exchange(transport, group, table, step, width=512, device=where, lands=step % 2 > 0)
            a @ a
            exchange.ok()
    torch.cuda.synchronize()
    transport.close()
    return recorder.entries


def _every_transport() -> dict[str, Any]:
    group, found = _group(), {}
    for name in NAMES:
        transport = _make(name)
        try:
            ready = transport.prepare(group) if hasattr(transport, "prepare") else Choice(True, "")
            found[name] = _all_splits(transport, group) if ready.value else [ready.reason]
            torch.cuda.synchronize()
        except RuntimeError as error:
            found[name] = [repr(error)]
        close(transport)
        print(name, found[name][:3], flush=True)
    return {**found, "recorded": _recorded(group)}


@pytest.fixture(scope="module")
def wrong() -> list[dict[str, Any]]:
    return run_ranks(2, _every_transport, timeout=45, start="spawn")


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_arrives(name: str, wrong: list[dict[str, Any]]) -> None:
    for of_rank in wrong:
        assert not of_rank[name], of_rank[name][:5]


def test_peer_copies_are_in_order(wrong: list[dict[str, Any]]) -> None:
    report = check({rank: of_rank["recorded"] for rank, of_rank in enumerate(wrong)})
    assert report.clean and report.counts["await"], report.findings[:2]


def _one_rank_dies() -> None:
    from fluid_npu.comm.all_to_all import fluid_all_to_all
    from fluid_npu.comm.sink import DirectSink

    group, sink = _group(), DirectSink(transport=peer_copy_transport("cuda"))
    x = torch.ones(4, 1024, device="cuda")
    fluid_all_to_all(group, x, [2, 2], [2, 2], sink=sink)
    torch.cuda.synchronize()
    if dist.get_rank() == 1:
        os._exit(0)
    for _ in range(2):  # the first is let go by the watch, the second is told
        fluid_all_to_all(group, x, [2, 2], [2, 2], sink=sink)
        torch.cuda.synchronize()


def test_the_death_of_a_peer_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, _one_rank_dies, timeout=25, start="spawn")
    assert "CollectiveError" in str(caught.value) and "its process has ended" in str(caught.value)

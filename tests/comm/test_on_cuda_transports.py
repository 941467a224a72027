"""Every transport on two GPUs: bitwise what NCCL's AllToAll gives, with even, uneven, empty and back-to-back splits."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu.comm.transports import CollectiveTransport, FewCtasTransport, PairwiseTransport, carve_out
from fluid_npu.comm.transports.peer_open import peer_copy_transport
from tests.support.exchanges import Exchange, even, tables
from tests.support.ranks import RankError, run_ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NAMES = ("collective", "peer-copy", "peer-copy small window", "few-ctas", "pairwise")


def _group() -> Any:
    """An NCCL group beside the gloo group of the test's processes."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return dist.new_group(backend="nccl")


def _make(name: str) -> Any:
    if name == "collective":
        return CollectiveTransport()
    if name == "few-ctas":
        return FewCtasTransport(4)
    if name == "pairwise":
        return PairwiseTransport()
    return peer_copy_transport("cuda", window_bytes=64 << 10 if "small" in name else 64 << 20)


def _all_splits(name: str) -> list[str]:
    """What was wrong, by step."""
    group, transport = _group(), _make(name)
    if hasattr(transport, "prepare"):
        ready = transport.prepare(group)
        assert ready.value, ready.reason
    where, world, wrong = torch.device("cuda", torch.cuda.current_device()), dist.get_world_size(), []
    common: dict[str, Any] = {"device": where}

    def take(what: str, exchange: Exchange) -> None:
        if not exchange.ok():
            wrong.append(what)

    take("even", Exchange(transport, group, even(world, 512), 0, lists=False, width=1024, **common))
    take("empty", Exchange(transport, group, even(world, 0), 1, **common))
    for step, table in enumerate(tables(world, 16, seed=5)):
        dtype = (torch.bfloat16, torch.float32, torch.int64, torch.uint8)[step % 4]
        exchange = Exchange(transport, group, table, step, width=(1, 33, 1024)[step % 3], dtype=dtype, **common)
        take(f"step {step}: {table}", exchange)
    take("64 MiB", Exchange(transport, group, even(world, 16384), 3, width=2048, dtype=torch.bfloat16, **common))
    flights = [Exchange(transport, group, t, i, width=512, **common) for i, t in enumerate(tables(world, 200, seed=9))]
    for index, flight in enumerate(flights):
        take(f"back to back {index}", flight)
    torch.cuda.synchronize()
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_arrives(name: str) -> None:
    for wrong in run_ranks(2, _all_splits, name, timeout=60):
        assert not wrong, wrong[:5]


def _beside_products(name: str) -> list[bool]:
    """Exchanges whose flight is full of matrix products; buffers are dropped and reused at once."""
    group, transport = _group(), _make(name)
    where, world, good = torch.device("cuda", torch.cuda.current_device()), dist.get_world_size(), []
    a = torch.randn(4096, 4096, device=where, dtype=torch.bfloat16)
    for step, table in enumerate(tables(world, 40, seed=11, most=2000)):
        exchange = Exchange(transport, group, table, step, width=1024, dtype=torch.bfloat16, device=where)
        with carve_out(8 if name == "few-ctas" else 0):
            for _ in range(3):
                a @ a
        exchange.work.wait()
        del exchange.source
        torch.full((table[0][0] * 1024 + 8,), 7.0, device=where)
        good.append(exchange.ok())
    return good


@pytest.mark.parametrize("name", ["peer-copy", "few-ctas"])
def test_bytes_arrive_beside_matrix_products(name: str) -> None:
    for good in run_ranks(2, _beside_products, name, timeout=60):
        assert all(good), good


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
        run_ranks(2, _one_rank_dies, timeout=40)
    assert "CollectiveError" in str(caught.value) and "its process has ended" in str(caught.value)

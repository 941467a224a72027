"""Device-side splits between two GPUs: right rows, an overflow that all know of, and no host in between."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.exchanges import cargo, tables
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WIDTH = 1024


def _exchanges() -> dict[str, Any]:
    from fluid_npu.comm.device_splits import open_device_splits

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    group, index, world = dist.new_group(backend="nccl"), dist.get_rank(), dist.get_world_size()
    steps = tables(world, 40, seed=5, most=200)
    most = max(sum(column) for table in steps for column in zip(*table, strict=True))
    splits, reason = open_device_splits(
        group, capacity=most, row_shape=(WIDTH,), dtype=torch.bfloat16, programs=8, timeout_s=10.0
    )
    assert splits is not None, reason
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    wrong: list[str] = []

    def begin(table: Any, step: int) -> Any:
        source = cargo(table, step, WIDTH, torch.bfloat16, index)[0].cuda()
        return step, table, splits.start(source, torch.tensor(table[index], device="cuda"))

    under_way = []
    for step, table in enumerate(steps):
        under_way.append(begin(table, step))
        a @ a
        if step % 2:
            for number, of_step, arrival in under_way:
                arrival.wait()
                rows, told = arrival.rows.clone(), arrival.table.clone()
                arrival.release()
                expected = cargo(of_step, number, WIDTH, torch.bfloat16, index)[1]
                if not torch.equal(rows[: len(expected)].cpu(), expected) or told.tolist() != of_step:
                    wrong.append(f"step {number}: {of_step}")
            under_way.clear()
    full = [[0] * world for _ in range(world)]
    full[0][1] = most + 1
    _, _, arrival = begin(full, 40)
    arrival.wait()
    overflow = arrival.state()
    arrival.release()
    _, _, arrival = begin(steps[0], 41)
    arrival.wait()
    return {"wrong": wrong, "overflow": overflow, "after": arrival.state()}


def test_rows_arrive_and_an_overflow_is_known_to_all() -> None:
    for found in run_ranks(2, _exchanges, timeout=60, start="spawn"):
        assert found == {"wrong": [], "overflow": 1, "after": 0}

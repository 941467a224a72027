"""HCCL between two ranks through torch_npu's process group: every collective that is simulated."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.support.ranks import run_ranks


def collectives() -> dict[str, Any]:
    """Runs each collective on this rank and returns what came out, by name, as lists."""
    from fluid_npu.device.npu import load_torch_npu

    rank, world = dist.get_rank(), dist.get_world_size()
    load_torch_npu().npu.set_device(rank)
    group = dist.new_group(backend="hccl")
    out: dict[str, Any] = {}

    def mine(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).npu() + 10 * rank

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32):
        x = mine(1, 2, dtype=dtype)
        dist.all_reduce(x, group=group)
        out[f"all_reduce {dtype}"] = x.tolist()
    for op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
        x = mine(1, 2)
        dist.all_reduce(x, op, group=group)
        out[f"all_reduce {op}"] = x.tolist()
    x = mine(1, 2)
    dist.broadcast(x, 1, group=group)
    out["broadcast"] = x.tolist()
    x = mine(1, 2)
    dist.reduce(x, 0, group=group)
    out["reduce"] = x.tolist() if rank == 0 else None
    gathered = torch.zeros(2 * world).npu()
    dist.all_gather_into_tensor(gathered, mine(1, 2), group=group)
    out["all_gather_into_tensor"] = gathered.tolist()
    parts = [torch.zeros(2).npu() for _ in range(world)]
    dist.all_gather(parts, mine(1, 2), group=group)
    out["all_gather"] = [part.tolist() for part in parts]
    x = torch.zeros(2).npu()
    dist.reduce_scatter_tensor(x, mine(1, 2, 3, 4), group=group)
    out["reduce_scatter"] = x.tolist()
    x = torch.zeros(2).npu()
    dist.scatter(x, [mine(1, 2), mine(3, 4)] if rank == 0 else None, src=0, group=group)
    out["scatter"] = x.tolist()
    x = torch.zeros(2).npu()
    dist.all_to_all_single(x, mine(1, 2), group=group)
    out["all_to_all equal"] = x.tolist()
    out.update(uneven_all_to_all(rank, group), **point_to_point(rank, group))
    dist.barrier(group=group)
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    out["all_gather_object"] = objects
    torch.npu.synchronize()
    return out


def uneven_all_to_all(rank: int, group: Any) -> dict[str, Any]:
    """Rows of [2]; rank 0 sends 1 and 3 rows, rank 1 sends 0 and 2. Asynchronous, with computation beside it."""
    send = [[1, 3], [0, 2]][rank]
    receive = [[1, 0], [3, 2]][rank]
    rows = torch.arange(2.0 * sum(send)).view(-1, 2).npu() + 100 * rank
    x = torch.zeros(sum(receive), 2).npu()
    work = dist.all_to_all_single(x, rows, receive, send, group=group, async_op=True)
    beside = torch.ones(64, 64).npu() @ torch.ones(64, 64).npu()
    work.wait()
    nothing = torch.zeros(0, 2).npu()
    dist.all_to_all_single(nothing, torch.zeros(0, 2).npu(), [0, 0], [0, 0], group=group)
    return {"all_to_all uneven": x.tolist(), "beside": float(beside.sum()), "nothing": list(nothing.shape)}


def point_to_point(rank: int, group: Any) -> dict[str, Any]:
    """Rank 0 sends, rank 1 receives; then both at once in a batch."""
    x = torch.tensor([5.0, 6.0]).npu() if rank == 0 else torch.zeros(2).npu()
    if rank == 0:
        dist.send(x, 1, group=group)
    else:
        dist.recv(x, 0, group=group)
    given, taken, other = torch.full((3,), float(rank + 1)).npu(), torch.zeros(3).npu(), 1 - rank
    operations = [dist.P2POp(dist.isend, given, other, group), dist.P2POp(dist.irecv, taken, other, group)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return {"send": x.tolist(), "batch": taken.tolist()}


def test_every_collective_moves_the_right_values():
    first, second = run_ranks(2, collectives)
    both = {
        **{f"all_reduce torch.{kind}": [12, 14] for kind in ("float32", "bfloat16", "float16", "int64", "int32")},
        "all_reduce RedOpType.MAX": [11, 12],
        "all_reduce RedOpType.MIN": [1, 2],
        "all_reduce RedOpType.PRODUCT": [11, 24],
        "broadcast": [11, 12],
        "all_gather_into_tensor": [1, 2, 11, 12],
        "all_gather": [[1, 2], [11, 12]],
        "beside": 64.0**3,
        "nothing": [0, 2],
        "send": [5, 6],
        "all_gather_object": [{"rank": 0}, {"rank": 1}],
    }
    apart = {
        "reduce": ([12, 14], None),
        "reduce_scatter": ([12, 14], [16, 18]),
        "scatter": ([1, 2], [3, 4]),
        "all_to_all equal": ([1, 11], [2, 12]),
        "all_to_all uneven": ([[0, 1]], [[2, 3], [4, 5], [6, 7], [100, 101], [102, 103]]),
        "batch": ([2, 2, 2], [1, 1, 1]),
    }
    assert first == {**both, **{name: value[0] for name, value in apart.items()}}
    assert second == {**both, **{name: value[1] for name, value in apart.items()}}

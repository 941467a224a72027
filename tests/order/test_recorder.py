"""What the recorder sees on a CPU: reads and writes of operators, storages that go, collectives over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluid_npu.order.checker import check
from fluid_npu.order.recorder import OrderRecorder
from fluid_npu.order.records import Access, Entry, numbered

Ranks = Callable[..., list[Any]]


def recorded(body: Callable[[], Any]) -> list[Entry]:
    """Entries of operators, frees and what was kept alive, without allocations."""
    with OrderRecorder(0) as recorder:
        kept = body()
    del kept
    return [entry for entry in recorder.entries if entry.kind not in ("process", "alloc")]


def test_reads_and_writes_follow_the_schema() -> None:
    x, out, index = torch.ones(4, 4), torch.empty(2, 4), torch.tensor([1, 2])

    def body() -> list[Any]:
        torch.index_select(x, 0, index, out=out)
        x[:, 1:3].add_(1)
        x.zero_()
        return [x.view(2, 8), torch.zeros_like(x), x + 1, x.tolist()]

    select, add, zero, like, plus, read = recorded(body)
    number = {name: access.alloc for name, access in zip(("x", "index"), select.reads, strict=True)}
    whole = Access(number["x"], 0, 64)
    assert select.name == "aten::index_select.out" and select.writes[0] not in select.reads
    assert select.reads == (whole, Access(number["index"], 0, 16)) and select.writes[0].stop == 32
    assert add.reads == add.writes == (Access(number["x"], 4, 60),)
    assert (zero.reads, zero.writes) == ((), (whole,))
    assert like.reads == () and like.writes[0].alloc != number["x"]
    assert plus.reads == (whole,) and plus.writes[0].alloc not in (number["x"], like.writes[0].alloc)
    assert (read.name, read.reads) == ("Tensor.tolist", (whole,))
    assert "tests/order/test_recorder.py" in add.line and "in body" in add.line


def test_backward_is_recorded_and_memory_that_goes() -> None:
    w = torch.ones(3, 3, requires_grad=True)

    def body() -> None:
        (w @ w).sum().backward()

    entries = recorded(body)
    assert sum(entry.name == "aten::mm" for entry in entries) == 3
    freed = [entry.alloc for entry in entries if entry.kind == "free"]
    product = next(entry for entry in entries if entry.name == "aten::mm").writes[0].alloc
    assert product in freed and w.grad is not None


def test_nothing_is_left_patched() -> None:
    before = {name: getattr(torch.distributed.ProcessGroup, name) for name in ("allreduce", "barrier")}
    tolist = torch.Tensor.tolist
    with OrderRecorder(0):
        assert torch.Tensor.tolist is not tolist
    assert torch.Tensor.tolist is tolist and "tolist" not in vars(torch.Tensor)
    assert {name: getattr(torch.distributed.ProcessGroup, name) for name in before} == before


def collectives() -> list[Entry]:
    """Asynchronous exchanges: waited for, read too early, overwritten in flight; others in between."""
    import torch.distributed as dist

    rank = dist.get_rank()
    x, y, z = torch.ones(2 + rank, 2), torch.empty(2 + rank, 2), torch.ones(4)
    send, receive = ([1, 1], [1, 1]) if rank == 0 else ([1, 2], [1, 2])
    with OrderRecorder(rank, lambda: "rows") as recorder:
        work = dist.all_to_all_single(y, x, receive, send, async_op=True)
        work.wait()
        y.sum()
        dist.all_reduce(z)
        work = dist.all_to_all_single(y, x, receive, send, async_op=True)
        early = y.sum()
        x.fill_(2)
        work.wait()
        dist.broadcast(z, 1)
        dist.barrier()
    del early
    return recorder.entries


def test_collectives_over_gloo(run_ranks: Ranks) -> None:
    ranks = {rank: numbered(entries, rank) for rank, entries in enumerate(run_ranks(2, collectives))}
    issued = [entry for entry in ranks[1] if entry.kind == "collective"]
    names = ["alltoall_base", "allreduce", "alltoall_base", "broadcast", "barrier"]
    assert [entry.name for entry in issued] == names and {entry.label for entry in issued} == {"rows"}
    assert (issued[0].sends, issued[0].receives) == ((8, 16), (8, 16))
    assert issued[3].reads and not issued[3].writes and issued[3].sends == (16, 0)
    found = {(f.kind, f.first.name, f.second.name, f.second.line.partition(" ")[2]) for f in check(ranks).findings}
    assert found == {
        ("read-before-write", "alltoall_base (rows)", "aten::sum", "in collectives"),
        ("write-under-read", "alltoall_base (rows)", "aten::fill_.Scalar", "in collectives"),
    }


def training() -> list[Entry]:
    """Two optimizer steps of two micro-batches; router and FC2 carried over, gradients reduced as they get ready."""
    import torch.distributed as dist

    from fluid_npu.comm.guard import watch
    from tests.support.gpt import Run, train

    late = {"delay_wgrad_compute": True, "overlap_grad_reduce": True}
    run = Run(steps=2, micro_batches=2, spec={"carry_over": True}, ddp=late)
    with OrderRecorder(dist.get_rank(), lambda: watch.current.name if watch.current else "") as recorder:
        train(run)
    return recorder.entries


def test_an_overlapped_training_step_is_clean(run_ranks: Ranks) -> None:
    results = run_ranks(2, training, sizes={"expert_model_parallel_size": 2})
    report = check({rank: numbered(entries, rank) for rank, entries in enumerate(results)})
    assert report.clean, "\n".join(map(str, report.findings))
    # Steps x micro-batches x layers x ranks: counts, dispatch and combine, and the two backwards.
    exchanges = [e for entries in results for e in entries if e.name == "alltoall_base"]
    assert len(exchanges) == 2 * 2 * 2 * 2 * 5
    assert sum("backward of moe_" in e.label for e in exchanges) == 2 * 2 * 2 * 2 * 2
    # Something did run between launch and wait: weight gradients of the experts.
    between = [e for e in flown_over(results[0]) if "grouped_dw" in e.line or "_dw" in e.line]
    assert len(between) >= 2 * 2 * 2 * 2


def flown_over(entries: list[Entry]) -> list[Entry]:
    """Operators submitted between an exchange's launch and its wait."""
    landed = {entry.of: place for place, entry in enumerate(entries) if entry.kind == "landed"}
    found = []
    for place, entry in enumerate(entries):
        if entry.name == "alltoall_base":
            found += [other for other in entries[place : landed[entry.number]] if other.kind == "op"]
    return found

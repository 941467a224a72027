"""sp2hp and hp2sp against slicing of the whole sequence on one process: values, gradients, uneven and packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fluid_npu
from fluid_npu.comm.all_to_all import AllToAllHandle
from fluid_npu.comm.shards import SequenceShards
from fluid_npu.comm.sink import DirectSink
from fluid_npu.comm.ulysses import fluid_all_to_all_hp2sp, fluid_all_to_all_sp2hp
from tests.support.device import here

Ranks = Callable[..., list[Any]]
SIZE = 3
#: (heads, rows of each rank, bounds of packed sequences in Megatron's split, sizes between rows and heads)
CASES_2 = [
    (4, [3, 3], None, (2,)),
    (4, [5, 1], None, (2,)),
    (2, [0, 4], None, ()),
    (1, [4, 4], [0, 8], (2,)),
    (3, [2, 3], None, (1,)),  # copies, several heads a rank
]
CASES_4 = [
    (4, [2, 2, 2, 2], [0, 8], (2,)),
    (2, [1, 4, 0, 3], None, (2,)),
    (8, [14, 14, 14, 14], [0, 16, 40, 40, 56], ()),
    (6, [2, 2, 2, 2], None, (1,)),
    (1, [3, 3, 3, 3], None, (2,)),
]


def whole(heads: int, rows: int, between: tuple[int, ...], seed: int) -> torch.Tensor:
    """``[S, ..., N, D]``, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *between, heads, SIZE, generator=generator)


def rows_of_ranks(lengths: list[int], bounds: list[int] | None) -> list[list[int]]:
    """Numbers of the rows that each rank holds, spelled out."""
    if bounds is None:
        starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
        return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    ranks = len(lengths)
    held: list[list[int]] = [[] for _ in lengths]
    for start, end in zip(bounds, bounds[1:], strict=False):
        chunks = [list(range(start, end))[i * (end - start) // (2 * ranks) :][: (end - start) // (2 * ranks)]
                  for i in range(2 * ranks)]  # fmt: skip
        for rank in range(ranks):
            held[rank] += chunks[rank] + chunks[2 * ranks - 1 - rank]
    return held


def heads_of_rank(heads: int, ranks: int, rank: int) -> list[int]:
    """With fewer heads than ranks, several ranks hold one; in general each head is there the least equal times."""
    copies = next(c for c in range(1, ranks + 1) if heads * c % ranks == 0)
    dealt = [head for head in range(heads) for _ in range(copies)]
    return dealt[rank * len(dealt) // ranks : (rank + 1) * len(dealt) // ranks]


def there_and_back(cases: list[Any], async_op: bool, serialised: bool) -> list[dict[str, torch.Tensor]]:
    """Both exchanges of every case on this rank, each with a gradient of its own."""
    rank, results = dist.get_rank(), []
    for number, (heads, lengths, bounds, between) in enumerate(cases):
        mine = rows_of_ranks(lengths, bounds)[rank]
        how = {"cu_seqlens": bounds} if bounds is not None else {"lengths": lengths}
        sink = DirectSink(serialised=serialised)
        x = here(whole(heads, sum(lengths), between, number)[mine]).requires_grad_()
        out = fluid_all_to_all_sp2hp(x, dist.group.WORLD, async_op, sink=sink, **how)
        out = out.wait() if isinstance(out, AllToAllHandle) else out
        grads = here(whole(out.shape[-2], sum(lengths), between, 50 + 10 * number + rank))
        out.backward(grads)
        y = here(grads).clone().requires_grad_()
        back = fluid_all_to_all_hp2sp(y, dist.group.WORLD, async_op, sink=sink, **how)
        back = back.wait() if isinstance(back, AllToAllHandle) else back
        back.backward(here(whole(back.shape[-2], sum(lengths), between, 90 + number)[mine]))
        results.append({"out": out.detach(), "dx": x.grad, "back": back.detach(), "dy": y.grad})
        results[-1]["bytes"] = sink.comm.as_dict()["a2a_bytes"]
    return results


def check(cases: list[Any], ranks: list[Any]) -> None:
    """Against the whole tensors of one process, in float64."""
    world = len(ranks)
    for number, (heads, lengths, bounds, between) in enumerate(cases):
        held = rows_of_ranks(lengths, bounds)
        x = whole(heads, sum(lengths), between, number).double().requires_grad_()
        local = [heads_of_rank(heads, world, rank) for rank in range(world)]
        grads = [whole(len(local[r]), sum(lengths), between, 50 + 10 * number + r).double() for r in range(world)]
        sum(((x[..., local[r], :] * grads[r]).sum() for r in range(world)), torch.zeros(())).backward()
        joined = torch.cat(grads, -2)
        d_joined = whole(joined.shape[-2], sum(lengths), between, 90 + number)
        for rank, results in enumerate(ranks):
            got, width = results[number], len(local[rank])
            assert torch.equal(got["out"].double(), x.detach()[..., local[rank], :]), (number, rank)
            torch.testing.assert_close(got["dx"].double(), x.grad[held[rank]], rtol=1e-6, atol=1e-6)
            assert torch.equal(got["back"].double(), joined[held[rank]]), (number, rank)
            assert torch.equal(got["dy"], d_joined[..., rank * width : (rank + 1) * width, :]), (number, rank)


@pytest.mark.parametrize(("async_op", "serialised"), [(False, True), (True, False)])
def test_two_ranks(async_op: bool, serialised: bool, run_ranks: Ranks) -> None:
    check(CASES_2, run_ranks(2, there_and_back, CASES_2, async_op, serialised))


def test_four_ranks_with_fewer_key_heads_than_ranks(run_ranks: Ranks) -> None:
    check(CASES_4, run_ranks(4, there_and_back, CASES_4, True, False))


def copies_made() -> dict[str, Any]:
    """Storage of what was received and sent, and bytes counted."""
    sink = DirectSink()
    x = torch.randn(4, 2, 4, SIZE, requires_grad=True)
    out = fluid_all_to_all_sp2hp(x, dist.group.WORLD, sink=sink)
    y = out.detach().requires_grad_()
    sent: list[int] = []
    start = sink.transport.start
    sink.transport.start = lambda into, source, *rest: (sent.append(source.data_ptr()), start(into, source, *rest))[1]
    fluid_all_to_all_hp2sp(y, dist.group.WORLD, sink=sink)
    return {
        "whole": out._base is None or out._base.shape[0] == 8,
        "as_is": sent == [y.data_ptr()],
        **sink.comm.as_dict(),
    }


@pytest.mark.host
def test_what_is_sent_back_is_not_copied_and_bytes_are_those_for_others(run_ranks: Ranks) -> None:
    for result in run_ranks(2, copies_made):
        assert result["whole"] and result["as_is"]
        # Half of the heads of 4 rows go out, then half of 8 rows of 2 heads.
        assert result["sp2hp_bytes"] == 4 * 2 * 2 * SIZE * 4 and result["hp2sp_bytes"] == 4 * 2 * 2 * SIZE * 4


def refuse() -> list[str]:
    """The messages of arguments that cannot be."""
    x, group = torch.zeros(3, 2, 4, SIZE), dist.group.WORLD
    calls = (
        lambda: fluid_all_to_all_sp2hp(x, group, lengths=[3]),
        lambda: fluid_all_to_all_sp2hp(x, group, lengths=[5, 4]),
        lambda: fluid_all_to_all_hp2sp(x, group),
        lambda: fluid_all_to_all_hp2sp(x, group, lengths=[1, 1]),
        lambda: fluid_all_to_all_sp2hp(x, group, cu_seqlens=[0, 6]),
        lambda: fluid_all_to_all_sp2hp(x, group, cu_seqlens=[4, 8]),
        lambda: fluid_all_to_all_sp2hp(x, group, cu_seqlens=[0, 8], lengths=[4, 4]),
        lambda: fluid_all_to_all_sp2hp(x[:, 0, 0], group),
    )
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


@pytest.mark.host
def test_wrong_arguments_are_refused_by_name(run_ranks: Ranks) -> None:
    messages = run_ranks(2, refuse)[0]
    wanted = (
        "lengths=[3]: one number of rows",
        "lengths: rank 0 has 5 of [5, 4], but x has 3 rows",
        "lengths=None: 3 rows do not divide by 2 ranks",
        "lengths: [1, 1] are 2 rows, but x has 3",
        "a sequence of 6 rows cannot be dealt in 2 * 2 equal chunks; pad it to 8 rows",
        "cu_seqlens=[4, 8]: must start with 0",
        "leave lengths out",
        "x of shape (3, 3): rows, heads and head size are needed",
    )
    for message, text in zip(messages, wanted, strict=True):
        assert text in message


def test_the_balanced_split_is_megatron_s() -> None:
    rows = torch.arange(16)
    shards = SequenceShards.balanced([0, 16], 2, torch.device("cpu"))
    held = torch.cat([torch.cat([rows.view(4, 4)[rank], rows.view(4, 4)[3 - rank]]) for rank in range(2)])
    assert shards.block == 4 and torch.equal(shards.in_order(held), rows) and torch.equal(shards.by_rank(rows), held)


def test_the_names_are_public() -> None:
    assert fluid_npu.fluid_all_to_all_sp2hp is fluid_all_to_all_sp2hp
    assert fluid_npu.fluid_all_to_all_hp2sp is fluid_all_to_all_hp2sp

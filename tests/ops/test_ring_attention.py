"""Ring attention against whole sequences in float64: chunks, windows, grouped heads, gradients, fused blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fluid_npu import device
from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.ring import pass_on
from fluid_npu.comm.sink import DirectSink
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.cpu_kernels import CpuKernels
from fluid_npu.ops.reference import relative_error
from fluid_npu.ops.ring_attention import RingCall, ring_attention, ring_block
from tests.support.device import here

Ranks = Callable[..., list[Any]]
ROWS, SCALE = 16, 0.3
#: (query heads, key heads, size of values, left, right)
CASES = [(4, 2, 6, None, 0), (3, 1, 4, 5, 0), (2, 2, 6, None, None), (2, 1, 6, 2, 1)]
#: Those that fused blocks take; the last with values narrower than keys.
FUSED = [*(case for case in CASES if case[3] is None), (6, 3, 4, None, 0)]
#: A GPU and an NPU take their fused blocks by themselves, a CPU when it is asked to.
ASKED = {"FLUID_ATTENTION": "torch"}


def tensors(case: Any) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, of the whole sequence."""
    heads, shared, values, *_ = case
    generator = torch.Generator().manual_seed(heads)
    shapes = ((heads, 6), (shared, 6), (shared, values), (heads, values))
    return [torch.randn(ROWS, 2, *shape, generator=generator) for shape in shapes]


def run(cases: list[Any], serialised: bool, dtype: torch.dtype, fused: bool = False) -> list[dict[str, torch.Tensor]]:
    """Output and gradients of this rank's rows, and how its flights went."""
    peers, results = Peers.of(dist.group.WORLD), []
    ranks, rank = len(peers.ranks), peers.index
    for case in cases:
        sink, filled = DirectSink(serialised=serialised), []
        mine = [here(x[held(ranks, rank)].to(dtype)) for x in tensors(case)]
        q, k, v = (x.requires_grad_() for x in mine[:3])
        call = RingCall(
            scale=SCALE,
            ranks=ranks,
            rank=rank,
            pass_on=lambda rows, back, sink=sink: pass_on(peers, rows, sink, backward=back).land,
            left=case[3],
            right=case[4],
            beside=lambda filled=filled: filled.append(1),
        )
        if fused:
            call = replace(call, block=ring_block(q, k, v, call).value)
        out = ring_attention(q, k, v, call)
        out.backward(mine[3].flatten(2))
        stats = sink.comm.as_dict()
        results.append({"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad})
        results[-1]["fused"] = call.block is not None
        results[-1]["flights"], results[-1]["filled"] = int(stats["a2a_count"]), len(filled)
    return results


def held(ranks: int, rank: int) -> list[int]:
    """Rows of a rank: chunks r and 2P - 1 - r."""
    rows = list(range(ROWS))
    chunks = [rows[i * ROWS // (2 * ranks) : (i + 1) * ROWS // (2 * ranks)] for i in range(2 * ranks)]
    return rows if ranks == 1 else chunks[rank] + chunks[2 * ranks - 1 - rank]


def whole(case: Any) -> dict[str, torch.Tensor]:
    """The same in float64, head by head."""
    heads, shared, _, left, right = case
    q, k, v, dy = (x.double() for x in tensors(case))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    at = torch.arange(ROWS)
    distance = at[:, None] - at[None]
    hidden = (distance > (ROWS if left is None else left)) | (distance < -(ROWS if right is None else right))
    outs = []
    for head in range(heads):
        key, value = (x[:, :, head * shared // heads] for x in (k, v))
        scores = torch.einsum("sbd,tbd->bst", q[:, :, head], key) * SCALE
        outs.append(torch.einsum("bst,tbd->sbd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value))
    out = torch.stack(outs, 2)
    out.backward(dy)
    return {"out": out.detach().flatten(2), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def check(ranks: list[Any], limit: float, cases: list[Any] = CASES) -> None:
    for index, case in enumerate(cases):
        want = whole(case)
        for rank, results in enumerate(ranks):
            for name, value in want.items():
                error = relative_error(results[index][name], value[held(len(ranks), rank)])
                assert error <= limit, (case, rank, name, error)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_is_the_softmax_over_the_whole_sequence(count: int, run_ranks: Ranks) -> None:
    ranks = run_ranks(count, run, CASES, False, torch.float32)
    check(ranks, 1e-6)
    # Keys and values go around twice, P - 1 hops each; their gradients P hops, home again.
    flights = 0 if count == 1 else 2 * (count - 1) + count
    assert all(result["flights"] == flights and result["filled"] == 1 for rank in ranks for result in rank)


def test_the_serialised_twin_has_the_same_bits_and_halves_are_summed_in_fp32(run_ranks: Ranks) -> None:
    overlapped, twin = (run_ranks(2, run, CASES, serialised, torch.bfloat16) for serialised in (False, True))
    check(overlapped, 1e-2)
    for one, other in zip(overlapped, twin, strict=True):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fused_blocks_are_the_softmax_over_the_whole_sequence(count: int, run_ranks: Ranks) -> None:
    ranks = run_ranks(count, run, FUSED, False, torch.float32, True, env=ASKED)
    assert all(result["fused"] for rank in ranks for result in rank)
    check(ranks, 1e-6, FUSED)
    flights = 0 if count == 1 else 2 * (count - 1) + count
    assert all(result["flights"] == flights and result["filled"] == 1 for rank in ranks for result in rank)


def test_the_twin_of_fused_blocks_has_the_same_bits(run_ranks: Ranks) -> None:
    overlapped, twin = (run_ranks(4, run, FUSED, serialised, torch.bfloat16, True, env=ASKED) for serialised in (0, 1))
    check(overlapped, 1.5e-2, FUSED)
    for one, other in zip(overlapped, twin, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a["fused"] and all(torch.equal(a[name], b[name]) for name in ("out", "dq", "dk", "dv"))


@pytest.mark.host
def test_what_no_fused_block_computes_takes_plain_products_with_the_reason() -> None:
    q = torch.zeros(4, 1, 4, 6)
    call = RingCall(scale=1.0, ranks=2, rank=0, pass_on=lambda rows, back: lambda: rows, right=0)
    assert ring_block(q, q, q, call) == Choice(None, "the device has no fused attention that gives its log-sum-exp")


@pytest.mark.host
def test_windows_and_short_chunks_take_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUID_ATTENTION", "torch")
    monkeypatch.setitem(device._kernels, "cpu", CpuKernels())
    q = torch.zeros(4, 1, 4, 6)
    call = RingCall(scale=1.0, ranks=2, rank=0, pass_on=lambda rows, back: lambda: rows, right=0)
    for changes in ({"left": 3}, {"right": 1}):
        block, reason = ring_block(q, q, q, replace(call, **changes))
        assert block is None and "sliding window" in reason
    assert "chunks of 1 rows" in ring_block(q[:2], q[:2], q[:2], call).reason
    assert "one floating dtype" in ring_block(q.double(), q.double(), q.double(), call).reason
    assert ring_block(q, q, q, call).value is not None


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(3, 1, 4, 6), torch.zeros(3, 1, 3, 6)
    call = RingCall(scale=1.0, ranks=2, rank=0, pass_on=lambda rows, back: lambda: rows)
    with pytest.raises(ValueError, match="3 rows: a rank holds two chunks"):
        ring_attention(q, q, q, call)
    with pytest.raises(ValueError, match=r"k \(2, 1, 3, 6\).*a divisor of the queries'"):
        ring_attention(q[:2], k[:2], k[:2], call)

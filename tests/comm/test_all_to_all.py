"""The AllToAll: values and gradients for uneven and empty splits, in both forms, and what it refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_npu.comm.all_to_all import AllToAllHandle, fluid_all_to_all
from fluid_npu.comm.sink import DirectSink, Passengers
from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
from tests.support.clock import planted_time
from tests.support.device import here

Ranks = Callable[..., list[Any]]
MATRICES_2 = [[[1, 2], [3, 4]], [[0, 5], [2, 0]], [[0, 0], [0, 0]], [[0, 7], [0, 0]]]


def rows_of(rank: int, count: int) -> torch.Tensor:
    """Distinct rows of a rank."""
    return (torch.arange(count * 3, dtype=torch.float32).view(count, 3) + 1000 * rank).requires_grad_()


def exchange(matrices: list[list[list[int]]], async_op: bool, serialised: bool) -> list[dict[str, torch.Tensor]]:
    """Exchanges rows by each matrix (rows from i to j) and sends weights of the received rows back as gradients."""
    rank = dist.get_rank()
    results = []
    for matrix in matrices:
        sends, receives = matrix[rank], [row[rank] for row in matrix]
        x = here(rows_of(rank, sum(sends)))
        sink = DirectSink(serialised=serialised)
        out = fluid_all_to_all(dist.group.WORLD, x, receives, sends, async_op=async_op, sink=sink)
        if isinstance(out, AllToAllHandle):
            out = out.wait()
        weight = here(torch.arange(out.numel(), dtype=torch.float32).view(out.shape)) + 100 * rank
        (out * weight).sum().backward()
        results.append({"out": out.detach(), "grad": x.grad, "stats": sink.comm.as_dict()})
    return results


def expected(matrix: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Received rows and input gradients of every rank, by plain slicing on one process."""
    world = len(matrix)
    sources = [rows_of(rank, sum(matrix[rank])).detach() for rank in range(world)]
    out = [torch.cat([sources[i].split(matrix[i])[j] for i in range(world)]) for j in range(world)]
    weights = [torch.arange(o.numel(), dtype=torch.float32).view_as(o) + 100 * j for j, o in enumerate(out)]
    back = [w.split([matrix[i][j] for i in range(world)]) for j, w in enumerate(weights)]
    return out, [torch.cat([back[j][i] for j in range(world)]) for i in range(world)]


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("serialised", [False, True])
def test_uneven_and_empty_splits(async_op: bool, serialised: bool, run_ranks: Ranks) -> None:
    for rank, results in enumerate(run_ranks(2, exchange, MATRICES_2, async_op, serialised)):
        for matrix, got in zip(MATRICES_2, results, strict=True):
            out, grad = expected(matrix)
            assert torch.equal(got["out"], out[rank])
            assert torch.equal(got["grad"], grad[rank])
            assert got["stats"]["a2a_count"] == 2
            others = sum(matrix[rank]) - matrix[rank][rank] + sum(row[rank] for row in matrix) - matrix[rank][rank]
            assert got["stats"]["a2a_bytes"] == others * 3 * 4
            assert (got["stats"]["a2a_ms"] > 0) == serialised


def random_matrices(world: int, examples: int) -> list[list[list[int]]]:
    """Split matrices drawn by hypothesis, so that zeros and extremes come up."""
    drawn: list[list[list[int]]] = []

    @settings(max_examples=examples, derandomize=True)
    @given(st.lists(st.lists(st.integers(0, 9), min_size=world, max_size=world), min_size=world, max_size=world))
    def draw(matrix: list[list[int]]) -> None:
        drawn.append(matrix)

    draw()
    return drawn


def test_random_splits_on_four_ranks(run_ranks: Ranks) -> None:
    matrices = random_matrices(4, 25)
    for rank, results in enumerate(run_ranks(4, exchange, matrices, True, False)):
        for matrix, got in zip(matrices, results, strict=True):
            out, grad = expected(matrix)
            assert torch.equal(got["out"], out[rank])
            assert torch.equal(got["grad"], grad[rank])


def refuse() -> list[str]:
    """The messages of wrong splits."""
    x = here(torch.zeros(3, 2))
    messages = []
    for output_splits, input_splits in (([3], [3]), ([1, 2], [1, 1]), ([1, -1], [1, 2]), (None, [1, 2]), (None, None)):
        with pytest.raises(ValueError) as caught:
            fluid_all_to_all(dist.group.WORLD, x, output_splits, input_splits)
        messages.append(str(caught.value))
    return messages


def test_wrong_splits_are_refused_by_name(run_ranks: Ranks) -> None:
    messages = run_ranks(2, refuse)[0]
    assert "output_splits=[3]: one entry for each of the 2 ranks" in messages[0]
    assert "input_splits=[1, 1] sums to 2, but tensor has 3 rows" in messages[1]
    assert "negative" in messages[2]
    assert "divisible by 2 ranks, got 3" in messages[3]
    assert "divisible by 2 ranks, got 3" in messages[4]


def deliver() -> dict[str, Any]:
    """A weight that travels as a passenger gets its gradient only after the flight was filled."""
    order: list[str] = []

    class Sink(DirectSink):
        def fill(self, comm_type: str, name: str) -> None:
            order.append(f"fill {comm_type}")

    weight = here(torch.ones(2)).requires_grad_()
    weight.register_post_accumulate_grad_hook(lambda _: order.append("weight ready"))

    def collect() -> tuple[torch.Tensor | None, ...]:
        order.append("collect")
        return (torch.full_like(weight, 7.0),)

    x = here(torch.ones(4, 2)).requires_grad_()
    out = fluid_all_to_all(dist.group.WORLD, x, None, None, sink=Sink(), passengers=Passengers([weight], collect))
    out.sum().backward()  # type: ignore[union-attr]
    return {"order": order, "weight": weight.grad, "x": x.grad}


def test_passengers_get_their_gradient_after_the_flight_was_filled(run_ranks: Ranks) -> None:
    result = run_ranks(2, deliver)[0]
    assert result["order"] == ["fill moe_dispatch", "collect", "weight ready"]
    assert torch.equal(result["weight"], torch.full((2,), 7.0))
    assert torch.equal(result["x"], torch.ones(4, 2))


def delayed() -> tuple[float, float]:
    """Milliseconds of an exchange with 60 ms planted, waited for at once, and after 80 ms of other work."""
    times: list[float] = []
    fluid_all_to_all(dist.group.WORLD, torch.ones(4, 2), None, None)  # connects
    with planted_time():
        for work in (0.0, 0.08):
            sink = DirectSink(transport=DelayedTransport(CollectiveTransport(), 60.0))
            handle = fluid_all_to_all(dist.group.WORLD, torch.ones(4, 2), None, None, async_op=True, sink=sink)
            time.sleep(work)
            handle.wait()  # type: ignore[union-attr]
            times.append(sink.comm.as_dict()["exposed_ms"])
    return times[0], times[1]


@pytest.mark.host  # where the delay is planted
def test_a_planted_delay_is_exposed_alone_and_hidden_behind_work(run_ranks: Ranks) -> None:
    exposed, hidden = run_ranks(2, delayed)[0]
    assert exposed == pytest.approx(60.0)
    assert hidden == pytest.approx(0.0, abs=1e-6)


def test_a_negative_delay_is_refused() -> None:
    with pytest.raises(ValueError, match="delay_ms=-1"):
        DelayedTransport(CollectiveTransport(), -1)

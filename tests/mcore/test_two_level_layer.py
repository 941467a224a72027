"""The MoE layer over an AllToAll in two legs: the bits of the collective's, overlapped and as its twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fluid_npu.comm.transports import TwoLevelTransport
from tests.support import moe
from tests.support.moe import Case, run_layer

CASES = [
    Case(ep=4, topk=2, micro_batches=2),
    Case(ep=4, topk=3, empty_experts=5, dispatch="once-per-rank"),
    Case(ep=4, topk=1, tokens=1, empty_experts=6),
]


def over_both() -> list[dict[str, dict[str, Any]]]:
    """Each case by the collective, in two legs, and in two legs as the twin."""
    build, transport = moe.fluid_layer, TwoLevelTransport(2)

    def in_two_legs(case: Case) -> Any:
        layer = build(case)
        layer.backward_scheduler.transport = transport
        return layer

    found = []
    for case in CASES:
        moe.fluid_layer = build
        runs = {"collective": run_layer(case)}
        moe.fluid_layer = in_two_legs
        found.append({**runs, "two legs": run_layer(case), "twin": run_layer(replace(case, twin=True))})
    return found


@pytest.fixture(scope="module")
def ranks(run_ranks: Callable[..., list[Any]]) -> list[Any]:
    return run_ranks(4, over_both, sizes={"expert_model_parallel_size": 4})


@pytest.mark.parametrize("number", range(len(CASES)))
def test_outputs_and_gradients_are_those_of_the_collective(number: int, ranks: list[Any]) -> None:
    for of_rank in ranks:
        expected = of_rank[number]["collective"]
        for name in ("two legs", "twin"):
            got = of_rank[number][name]
            for key in ("router", "fc1", "fc2"):
                assert torch.equal(got[key], expected[key]), (name, key)
            for key in ("out", "dx"):
                assert all(map(torch.equal, got[key], expected[key])), (name, key)
            assert got["stats"]["a2a_bytes"] == expected["stats"]["a2a_bytes"]
    across = [of_rank[number]["two legs"]["stats"]["a2a_across_nodes_bytes"] for of_rank in ranks]
    assert sum(across) > 0

"""The Fluid MoE layer on real ranks against a dense float64 loop, and overlapped against its serialised twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.moe import Case, run_layer, worst_error

FP32 = 1e-5

CASES = {
    "ep1": Case(ep=1),
    "ep2": Case(ep=2),
    "ep4": Case(ep=4),
    "ep2_top1": Case(ep=2, topk=1),
    "ep2_top6": Case(ep=2, topk=6),
    "zero_token_rank": Case(ep=4, experts=8, topk=2, empty_experts=5),
    "one_local_expert": Case(ep=4, experts=4, topk=2),
    "two_micro_batches": Case(ep=2, micro_batches=2),
    "unfused": Case(ep=2, micro_batches=2, fuse=False),
    "few_tokens": Case(ep=2, tokens=1, topk=1),
    "moe_recompute": Case(config={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "act_recompute": Case(config={"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}),
}


def _run_modes(case: Case) -> dict[str, dict[str, Any]]:
    modes = {
        "plain": replace(case, overlap="off"),
        "overlapped": replace(case, overlap="dw"),
        "twin": replace(case, overlap="dw", twin=True),
    }
    return {name: run_layer(mode) for name, mode in modes.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_a_dense_float64_loop_and_the_twin_bitwise(
    name: str, run_ranks: Callable[..., list[Any]]
) -> None:
    case = CASES[name]
    ranks = run_ranks(case.ep, _run_modes, case, sizes={"expert_model_parallel_size": case.ep})
    for mode in ("plain", "overlapped", "twin"):
        errors = worst_error(case, [rank[mode] for rank in ranks])
        assert max(errors.values()) <= FP32, f"{mode}: {errors}"
    for rank in ranks:
        for key in ("router", "fc1", "fc2"):
            assert torch.equal(rank["overlapped"][key], rank["twin"][key]), key
            assert torch.equal(rank["overlapped"][key], rank["plain"][key]), key
        for key in ("out", "dx"):
            for a, b in zip(rank["overlapped"][key], rank["twin"][key], strict=True):
                assert torch.equal(a, b), key


def test_weight_gradients_run_while_the_dispatch_is_in_flight(run_ranks: Callable[..., list[Any]]) -> None:
    case = Case(ep=2)
    overlapped, twin = (
        run_ranks(2, run_layer, c, sizes={"expert_model_parallel_size": 2})[0]["record"]
        for c in (case, replace(case, twin=True))
    )
    launch, wait = "launch", "wait"
    reverse = "backward of moe_dispatch AllToAll of layer 1"
    order = [(kind, name) for kind, name, _ in overlapped]
    flight = order[order.index((launch, reverse)) : order.index((wait, reverse))]
    assert [name for kind, name in flight if kind == "dw"] == ["layer 1 fc2", "layer 1 fc1"]
    order = [(kind, name) for kind, name, _ in twin]
    at = order.index((launch, reverse))
    assert order[at + 1] == (wait, reverse)
    assert [name for kind, name in order[at:] if kind == "dw"] == ["layer 1 fc2", "layer 1 fc1"]


def _stock_and_ours(case: Case) -> dict[str, dict[str, Any]]:
    return {"stock": run_layer(replace(case, impl="stock")), "ours": run_layer(case)}


@pytest.mark.parametrize("fuse", [True, False])
def test_bf16_is_not_worse_than_stock(fuse: bool, run_ranks: Callable[..., list[Any]]) -> None:
    """Errors against the float64 loop over the same bf16 weights and inputs; 10 % for the luck of rounding."""
    case = Case(tokens=64, dtype=torch.bfloat16, fuse=fuse, micro_batches=2, config={"moe_router_dtype": "fp32"})
    ranks = run_ranks(2, _stock_and_ours, case, sizes={"expert_model_parallel_size": 2})
    for rank in ranks:
        for a, b in zip(rank["stock"]["maps"], rank["ours"]["maps"], strict=True):
            assert torch.equal(a, b), "routing ties: the comparison would be of different experts"
    stock, ours = (worst_error(case, [rank[name] for rank in ranks]) for name in ("stock", "ours"))
    for key in stock:
        assert ours[key] <= 1.1 * stock[key], (key, ours[key], stock[key])

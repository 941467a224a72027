"""Chunks of tokens that are sent once per rank, on real ranks: against float64, stock, one piece and the twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.gpt import Run, check_trained, train_all
from tests.support.moe import Case, run_layer, worst_error
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps

Ranks = Callable[..., list[Any]]
FP32 = 1e-5
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
ACT = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
SHARED = {"moe_shared_expert_intermediate_size": 24}
DROPS = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}
BF16 = {"dtype": torch.bfloat16, "config": {"moe_router_dtype": "fp32"}}

TWO = [
    Case(chunks=2, topk=3, micro_batches=2),
    Case(chunks=3, topk=8, fuse=False, micro_batches=2),
    Case(chunks=4, topk=1, experts=2, micro_batches=2),
    # More chunks than tokens; experts and a rank without any.
    Case(chunks=2, tokens=1, topk=1, micro_batches=2),
    Case(chunks=3, topk=3, empty_experts=4, fuse=False),
    Case(chunks=2, topk=3, config=MOE),
    Case(chunks=2, topk=3, config={**ACT, **SHARED}, micro_batches=2),
    Case(chunks=2, topk=4, config=DROPS),
    Case(chunks=4, topk=4, **BF16),
    Case(chunks=4, experts=64, topk=6, tokens=40),
]
FOUR = [
    Case(ep=4, chunks=2, topk=3, micro_batches=2),
    Case(ep=4, chunks=3, experts=16, topk=6, empty_experts=9, micro_batches=2),
]


def modes(cases: list[Case]) -> list[dict[str, dict[str, Any]]]:
    """Each case in chunks of tokens, as the twin of that, and in one piece."""
    once = [replace(case, overlap="full", dispatch="once-per-rank") for case in cases]
    return [
        {
            "chunks": run_layer(case),
            "twin": run_layer(replace(case, twin=True)),
            "whole": run_layer(replace(case, overlap="dw", chunks="auto")),
        }
        for case in once
    ]


def compare(case: Case, run: dict[str, dict[str, Any]]) -> None:
    """One rank: equal to the twin; the bytes of one piece, and rows of one piece within rounding."""
    for key in ("router", "fc1", "fc2"):
        assert torch.equal(run["chunks"][key], run["twin"][key]), f"{case} {key}"
    for key in ("out", "dx"):
        assert all(map(torch.equal, run["chunks"][key], run["twin"][key])), f"{case} {key}"
        if case.dtype == torch.float32:
            for mine, whole in zip(run["chunks"][key], run["whole"][key], strict=True):
                torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)
    ours, whole = (run[name]["stats"] for name in ("chunks", "whole"))
    for name in ("a2a_bytes", "a2a_plain_bytes"):
        assert ours[name] == whole[name], f"{case} {name}"
    assert ours["a2a_count"] == case.chunks * whole["a2a_count"]
    assert ours["total_dw_tasks"] == ours["completed_dw_tasks"] == whole["total_dw_tasks"]


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two_ranks", "four_ranks"])
def test_chunks_of_tokens_are_right_and_equal_to_their_twin(cases: list[Case], run_ranks: Ranks) -> None:
    ep = cases[0].ep
    ranks = run_ranks(ep, modes, cases, sizes={"expert_model_parallel_size": ep})
    for index, case in enumerate(cases):
        runs = [rank[index] for rank in ranks]
        if not case.config.keys() & {*SHARED, *DROPS} and case.dtype == torch.float32:  # the loop has neither
            errors = worst_error(case, [run["chunks"] for run in runs])
            assert max(errors.values()) <= FP32, f"{case}: {errors}"
        for run in runs:
            compare(case, run)


LATE: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True, "bucket_size": 2000}
FULL = {"overlap": "full", "chunks": 2, "carry_over": True, "dispatch": "once-per-rank"}
MODEL = Run(micro_batches=2, ddp=LATE, config={"moe_router_topk": 3, **SHARED}, spec=FULL)


def test_a_model_with_carry_over_trains_as_stock_and_as_its_twin(run_ranks: Ranks) -> None:
    """Under Megatron's DDP with late gradients and a bucket for each weight."""
    runs = [replace(MODEL, impl="stock", ddp={}, spec={}), MODEL, replace(MODEL, impl="twin")]
    for stock, ours, twin in run_ranks(2, train_all, runs, sizes={"expert_model_parallel_size": 2}):
        check_trained(ours, stock, twin, FP32)
        assert ours["regions"]["layer 2 fc2"] == "backward of moe_combine AllToAlls of layer 1"
        assert ours["regions"]["layer 2 fc1"] == "backward of moe_dispatch AllToAlls of layer 2"


def test_the_order_of_a_training_step_is_clean(run_ranks: Ranks) -> None:
    results = run_ranks(2, recorded_steps, MODEL, sizes={"expert_model_parallel_size": 2})
    # Steps x micro-batches x layers x ranks: counts, once for all chunks, and four exchanges of each of two.
    assert exchanges_of_clean_steps(results) == 2 * 2 * 2 * 2 * 9

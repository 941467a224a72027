"""Chunks of tokens sent once per rank, or of experts, on real ranks: against float64, stock, one piece and the twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.gpt import Run, check_trained, train_all
from tests.support.moe import Case
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps
from tests.support.pieces import FP32, check_pieces

Ranks = Callable[..., list[Any]]
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


#: Of experts: the same cases where they divide, and with local rows first.
OF_EXPERTS = [replace(case, chunks=2 if case.chunks == 3 else case.chunks, chunks_of="experts") for case in TWO]
OF_EXPERTS = [replace(case, chunks=1) if case.experts == 2 else case for case in OF_EXPERTS]
OF_EXPERTS += [replace(case, local_first=True) for case in OF_EXPERTS if case.chunks in (2, 4)]
OF_EXPERTS_4 = [
    replace(case, chunks=2, chunks_of="experts", local_first=first) for case in FOUR for first in (False, True)
]


@pytest.mark.parametrize(
    "cases", [TWO, FOUR, OF_EXPERTS, OF_EXPERTS_4], ids=["two", "four", "experts_two", "experts_four"]
)
def test_chunks_are_right_and_equal_to_their_twin(cases: list[Case], run_ranks: Ranks) -> None:
    tokens = {"overlap": "full", "dispatch": "once-per-rank"}
    chosen = [
        replace(case, **tokens, chunks_of="tokens" if case.chunks_of == "auto" else case.chunks_of) for case in cases
    ]
    check_pieces(run_ranks, chosen, {*SHARED, *DROPS})


LATE: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True, "bucket_size": 2000}
FULL = {"overlap": "full", "chunks": 2, "carry_over": True, "dispatch": "once-per-rank", "chunks_of": "tokens"}
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

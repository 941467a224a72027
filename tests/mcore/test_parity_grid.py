"""Nightly: the MoE layer over EP x top-k x micro-batches x routing against a dense float64 loop and its twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tests.support.moe import Case, run_layer, worst_error

FP32 = 1e-5
GRID = list(product((1, 2, 4), (1, 2, 6), (1, 2, 4)))


def run_grid(cases: list[Case]) -> list[dict[str, dict[str, Any]]]:
    """Every case of one expert-parallel size: plain, overlapped, and the twin."""
    return [
        {
            "plain": run_layer(replace(case, overlap="off")),
            "overlapped": run_layer(case),
            "twin": run_layer(replace(case, twin=True)),
        }
        for case in cases
    ]


@pytest.mark.nightly
@pytest.mark.parametrize("empty_experts", [0, 2], ids=["every_expert", "two_empty_experts"])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_the_grid_of_ep_topk_and_micro_batches(
    ep: int, empty_experts: int, run_ranks: Callable[..., list[Any]]
) -> None:
    cases = [
        Case(ep=ep, topk=topk, micro_batches=micro, empty_experts=empty_experts)
        for size, topk, micro in GRID
        if size == ep
    ]
    ranks = run_ranks(ep, run_grid, cases, sizes={"expert_model_parallel_size": ep}, timeout=250)
    for index, case in enumerate(cases):
        for mode in ("plain", "overlapped", "twin"):
            errors = worst_error(case, [rank[index][mode] for rank in ranks])
            assert max(errors.values()) <= FP32, f"{case} {mode}: {errors}"
        for rank in ranks:
            for key in ("router", "fc1", "fc2"):
                assert torch.equal(rank[index]["overlapped"][key], rank[index]["twin"][key]), f"{case} {key}"

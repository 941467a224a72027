"""How many operators one forward and backward of a layer launches: bounds that only fall.

On a CPU, where the grouped matmuls and the kernels of rows are torch's own; ``tests/support/triton_cases.py`` counts
what CUDA launches around the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.device import here
from tests.support.moe import Case, fluid_layer, inputs
from tests.support.op_count import OpCount

pytestmark = pytest.mark.host

#: 227, 230 and 262 with torch 2.13; older ones launch some more.
MOST = {"two pieces": 238, "local first": 241, "static, local first": 273}
CASES = {"plain": Case(topk=3), "once-per-rank": Case(topk=3, dispatch="once-per-rank")}


def counted(cases: dict[str, Case]) -> dict[str, dict[str, int]]:
    """Operators of the second micro-batch, by name."""
    found = {}
    for name, case in cases.items():
        layer = fluid_layer(case)
        for parameter in layer.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        for micro in range(2):
            x, dy = (here(value) for value in inputs(case, 0, micro))
            with OpCount() as count:
                layer(x.requires_grad_())[0].backward(dy)
        found[name] = dict(count.ops)
    return found


PIECES = {
    "two pieces": Case(experts=64, topk=6, dispatch="once-per-rank", overlap="full", chunks=2),
    "local first": Case(experts=64, topk=6, dispatch="once-per-rank", overlap="full", chunks=1, local_first=True),
    "static, local first": Case(experts=64, topk=6, dispatch="static", overlap="full", chunks=1, local_first=True),
}


def test_a_layer_in_pieces_launches_no_more_than_today(run_ranks: Callable[..., list[Any]]) -> None:
    """With 32 local experts. Without matmuls, which some versions of torch have one of for each expert."""
    for found in run_ranks(2, counted, PIECES, sizes={"expert_model_parallel_size": 2}):
        totals = {name: sum(n for op, n in ops.items() if "mm" not in op) for name, ops in found.items()}
        assert all(totals[name] <= MOST[name] for name in MOST), (totals, found)


def test_no_more_operators_than_today(run_ranks: Callable[..., list[Any]]) -> None:
    for found in run_ranks(2, counted, CASES, sizes={"expert_model_parallel_size": 2}):
        totals = {name: sum(ops.values()) for name, ops in found.items()}
        # 72 and 143 with torch 2.13, 83 and 154 with 2.7.1
        assert totals["plain"] <= 84 and totals["once-per-rank"] <= 154, (totals, found)

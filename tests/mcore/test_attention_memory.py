"""Memory of layers under context parallelism stays flat: what is kept after a step is not more after many."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from tests.support.context import Case, Stack, sample
from tests.support.device import here

Ranks = Callable[..., list[Any]]
CASES = [
    Case(layers=2, chunks=2, carry=True, key_heads=4),
    Case(),
    Case(layers=2, carry=True, config={"cp_comm_type": "ring"}),
]


def grown(case: Case, steps: int) -> dict[str, float]:
    """Python objects, tensors and resident MiB after the last step beyond those after a third of them."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from fluid_npu.schedule.live import get_backward_scheduler

    stack = here(Stack(case))
    for parameter in stack.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    rotary = RotaryEmbedding(8, 1.0)(case.rows)
    found = []
    for step in range(1, steps + 1):
        x, g = (here(value[: case.rows // case.cp]) for value in sample(case, 0, step))
        (stack(x.requires_grad_(), rotary) * g).sum().backward()
        stack.zero_grad()
        del x, g
        if step in (steps // 3, steps):
            get_backward_scheduler(stack).get_stats()  # adds up timings, which are kept until there are 2,048
            gc.collect()
            objects = gc.get_objects()
            tensors = sum(issubclass(type(item), torch.Tensor) for item in objects)
            found.append((len(objects), tensors, psutil.Process().memory_info().rss / 2**20))
            del objects
    first, last = found
    return {name: b - a for name, a, b in zip(("objects", "tensors", "mib"), first, last, strict=True)}


def all_grown(steps: int) -> list[dict[str, float]]:
    """Of every case."""
    return [grown(case, steps) for case in CASES]


@pytest.mark.parametrize("steps", [pytest.param(300, marks=pytest.mark.nightly), 39])
def test_nothing_is_kept_from_step_to_step(steps: int, run_ranks: Ranks) -> None:
    for found in run_ranks(2, all_grown, steps, sizes=CASES[0].sizes, timeout=280):
        for growth in found:
            # The first reading's own list and tuple are alive at the second. Fewer tensors are no growth.
            assert growth["tensors"] <= 0 and growth["objects"] <= 50 and growth["mib"] <= 4, growth
    print(f"2 ranks, {steps} steps: resident memory grew by {max(one['mib'] for one in found):.2f} MiB")

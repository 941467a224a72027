"""The host learns all counts of a dispatch in one wait or in two: the same rows, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fluid_npu.device import kernels_of
from tests.support.device import here
from tests.support.gpt import same_bits
from tests.support.moe import Case, run_layer

CASES = [Case(topk=3), Case(topk=3, dispatch="once-per-rank"), Case(topk=2, empty_experts=5)]


def in_two_waits_and_in_one(cases: list[Case]) -> list[list[dict[str, Any]]]:
    kernels, found = kernels_of(here(torch.zeros(1))), []
    for waits in (False, True):
        kernels.one_wait_for_counts = waits
        found.append([run_layer(case) for case in cases])
    return found


def tensors(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Output, input gradient and weight gradients of a run of one micro-batch."""
    return {"out": result["out"][0], "dx": result["dx"][0], **{name: result[name] for name in ("router", "fc1", "fc2")}}


def test_one_wait_and_two_give_the_same(run_ranks: Callable[..., list[Any]]) -> None:
    for two, one in run_ranks(2, in_two_waits_and_in_one, CASES, sizes={"expert_model_parallel_size": 2}):
        for a, b in zip(two, one, strict=True):
            assert same_bits(tensors(a), tensors(b)) == []
            assert a["stats"]["a2a_bytes"] == b["stats"]["a2a_bytes"]

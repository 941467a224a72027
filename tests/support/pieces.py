"""Layers in pieces whose sums run in another order: against float64, their twin, and the layer in one piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests.support.moe import Case, run_layer, worst_error

FP32 = 1e-5


def modes(cases: list[Case]) -> list[dict[str, dict[str, Any]]]:
    """Each case in pieces, as the twin of that, and in one piece."""
    return [
        {
            "pieces": run_layer(case),
            "twin": run_layer(replace(case, twin=True)),
            "whole": run_layer(replace(case, overlap="dw", chunks="auto", chunks_of="auto", local_first=False)),
        }
        for case in cases
    ]


def compare(case: Case, run: dict[str, dict[str, Any]]) -> None:
    """One rank: bitwise its twin; the bytes, exchanges and tasks of one piece, and its rows within rounding."""
    for key in ("router", "fc1", "fc2"):
        assert torch.equal(run["pieces"][key], run["twin"][key]), f"{case} {key}"
    for key in ("out", "dx"):
        assert all(map(torch.equal, run["pieces"][key], run["twin"][key])), f"{case} {key}"
        if case.dtype == torch.float32:
            for mine, whole in zip(run["pieces"][key], run["whole"][key], strict=True):
                torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)
    ours, whole = (run[name]["stats"] for name in ("pieces", "whole"))
    assert ours["a2a_plain_bytes"] == whole["a2a_plain_bytes"], f"{case}"
    again = case.dispatch == "once-per-rank" and case.chunks_of == "experts"  # a token may be sent in several chunks
    assert ours["a2a_bytes"] == whole["a2a_bytes"] or (again and ours["a2a_bytes"] > whole["a2a_bytes"]), f"{case}"
    assert ours["a2a_count"] == case.chunks * whole["a2a_count"]
    assert ours["total_dw_tasks"] == ours["completed_dw_tasks"] == whole["total_dw_tasks"]


def check_pieces(run_ranks: Callable[..., list[Any]], cases: list[Case], no_loop: set[str]) -> None:
    """All cases on real ranks. ``no_loop``: settings of Megatron that the float64 loop does not have."""
    ep = cases[0].ep
    ranks = run_ranks(ep, modes, cases, sizes={"expert_model_parallel_size": ep})
    for index, case in enumerate(cases):
        runs = [rank[index] for rank in ranks]
        if not case.config.keys() & no_loop and case.dtype == torch.float32:
            errors = worst_error(case, [run["pieces"] for run in runs])
            assert max(errors.values()) <= FP32, f"{case}: {errors}"
        for run in runs:
            compare(case, run)

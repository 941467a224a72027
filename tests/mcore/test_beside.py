"""Which grouped matmuls of a layer are said to run beside an AllToAll: they may take another kernel there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from tests.support.device import here
from tests.support.moe import Case, fluid_layer, inputs

Ranks = Callable[..., list[Any]]

CASES = {
    "one piece": Case(),
    "off": Case(overlap="off"),
    "2 chunks": Case(overlap="full", chunks=2),
    "local rows first": Case(overlap="full", chunks=1, local_first=True),
}


def said() -> dict[str, list[str]]:
    """Of each case, and of its twin: every grouped matmul of a step, * where it runs beside an exchange."""
    import torch.distributed as dist

    from fluid_npu.device import kernels_of
    from fluid_npu.device.kernels.beside import is_beside

    kernels, found = type(kernels_of(here(torch.ones(1)))), {}
    notes: list[str] = []

    def noting(name: str, short: str) -> None:
        plain = getattr(kernels, name)

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            notes.append(short + "*" * is_beside())
            return plain(self, *args, **kwargs)

        setattr(kernels, name, noted)

    for name, short in {"grouped_mm": "mm", "grouped_dw": "dw"}.items():
        noting(name, short)
    for name, case in CASES.items():
        layer = fluid_layer(replace(case, fuse=False))
        for twin in (False, True):
            notes.clear()
            x, _ = inputs(case, dist.get_rank(), 0)
            with layer.backward_scheduler.serialise() if twin else nullcontext():
                layer(here(x).requires_grad_())[0].sum().backward()
            found[f"{name}{', twin' if twin else ''}"] = list(notes)
    return found


def test_what_runs_beside_an_exchange_is_said_and_the_twin_says_the_same(run_ranks: Ranks) -> None:
    for found in run_ranks(2, said, sizes={"expert_model_parallel_size": 2}):
        assert all(found[name] == found[f"{name}, twin"] for name in CASES)
        # FC1, FC2; dX of FC2, dX of FC1; dW of FC2 and FC1 beside the dispatch's backward.
        assert found["one piece"] == ["mm", "mm", "mm", "mm", "dw*", "dw*"]
        assert found["off"] == ["mm", "mm", "mm", "dw", "mm", "dw"]
        # The first chunk beside the second's dispatch, the second beside the first's combine; backward alike, then dW.
        assert found["2 chunks"] == ["mm*", "mm*"] * 4 + ["dw*"] * 4
        # Own FC1 beside the dispatch; the others' rows with nothing in flight; own FC2 beside the combine. Backward:
        # own rows beside the combine's, the others' with nothing in flight, since what stays has no exchange.
        assert found["local rows first"] == ["mm*", "mm", "mm", "mm*", "mm*", "mm*", "mm", "mm", "dw*", "dw*"]

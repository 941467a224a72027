"""Rows that stay on their rank as the first chunk, on real ranks: against float64, one piece, the twin and stock."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.clock import planted_time
from tests.support.device import here
from tests.support.gpt import Run, check_trained, train_all
from tests.support.moe import Case, fluid_layer, inputs
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps
from tests.support.pieces import FP32, check_pieces
from tests.support.refusals import value_errors

Ranks = Callable[..., list[Any]]
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
SHARED = {"moe_shared_expert_intermediate_size": 24}
PADDED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
DROPS = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}
ACT = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
ONCE = {"dispatch": "once-per-rank"}
STATIC = {"dispatch": "static"}

TWO = [
    Case(chunks=1, micro_batches=2),
    Case(chunks=2, topk=3, micro_batches=2, fuse=False),
    Case(chunks=4, experts=64, topk=6, tokens=40),
    Case(chunks=1, topk=1, experts=2, micro_batches=2),
    # A rank whose experts get no token, then one token in all: nothing stays, or nothing leaves.
    Case(chunks=2, topk=3, empty_experts=4, micro_batches=2),
    Case(chunks=2, tokens=1, topk=1),
    Case(chunks=2, topk=3, config=MOE),
    Case(chunks=2, config={**PADDED, **SHARED}, micro_batches=2),
    Case(chunks=2, topk=4, dtype=torch.bfloat16, config={"moe_router_dtype": "fp32"}),
    Case(chunks=1, topk=3, micro_batches=2, **ONCE),
    Case(chunks=3, topk=3, empty_experts=4, fuse=False, micro_batches=2, **ONCE),
    Case(chunks=2, tokens=1, topk=1, **ONCE),
    Case(chunks=2, topk=4, config={**DROPS, **SHARED}, **ONCE),
    Case(chunks=1, topk=3, micro_batches=2, empty_experts=4, **STATIC),
    Case(chunks=1, topk=3, fuse=False, config={**SHARED, **ACT}, **STATIC),
    Case(chunks=1, tokens=1, topk=1, **STATIC),
]
FOUR = [
    Case(ep=4, chunks=2, topk=3, micro_batches=2),
    Case(ep=4, chunks=1, experts=16, topk=6, empty_experts=9, micro_batches=2),
    Case(ep=4, chunks=2, experts=16, topk=6, empty_experts=9, micro_batches=2, **ONCE),
    Case(ep=4, chunks=1, experts=16, topk=6, empty_experts=9, micro_batches=2, **STATIC),
]


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two_ranks", "four_ranks"])
def test_local_rows_first_is_right_and_equal_to_its_twin(cases: list[Case], run_ranks: Ranks) -> None:
    check_pieces(run_ranks, [replace(case, overlap="full", local_first=True) for case in cases], {*SHARED, *DROPS})


LATE: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True, "bucket_size": 2000}
FIRST = {"overlap": "full", "chunks": 2, "carry_over": True, "local_first": True}
MODEL = Run(micro_batches=2, ddp=LATE, config={"moe_router_topk": 3, **SHARED}, spec=FIRST)


def test_a_model_with_carry_over_trains_as_stock_and_as_its_twin(run_ranks: Ranks) -> None:
    """Under Megatron's DDP with late gradients and a bucket for each weight."""
    runs = [replace(MODEL, impl="stock", ddp={}, spec={}), MODEL, replace(MODEL, impl="twin")]
    for stock, ours, twin in run_ranks(2, train_all, runs, sizes={"expert_model_parallel_size": 2}):
        check_trained(ours, stock, twin, FP32)
        assert ours["regions"]["layer 2 fc2"] == "backward of moe_combine AllToAlls of layer 1"
        assert ours["regions"]["layer 2 fc1"] == "backward of moe_dispatch AllToAlls of layer 2"


def test_the_order_of_a_training_step_is_clean(run_ranks: Ranks) -> None:
    results = run_ranks(2, recorded_steps, MODEL, sizes={"expert_model_parallel_size": 2})
    # Steps x micro-batches x layers x ranks: counts, and four exchanges of each of two chunks; none of local rows.
    assert exchanges_of_clean_steps(results) == 2 * 2 * 2 * 2 * 9


def order_of_a_step() -> list[str]:
    """What a layer does in which order; a computation is noted by its begin."""
    import contextlib

    import torch.distributed as dist

    layer = fluid_layer(Case(overlap="full", chunks=2, local_first=True, fuse=False))
    scheduler = layer.backward_scheduler
    note = scheduler.recorder
    scheduler.computing = lambda name: (note.add("compute", name), contextlib.nullcontext())[1]
    note.enabled = True
    x, _ = inputs(Case(), dist.get_rank(), 0)
    layer(here(x).requires_grad_())[0].sum().backward()
    return [f"{record.kind} {record.name}" for record in note.take()]


def test_local_rows_are_computed_while_the_first_and_the_last_exchange_fly(run_ranks: Ranks) -> None:
    d1, d2, c1, c2 = (
        f"moe_{kind} AllToAll of layer 1 chunk {n} of 2" for kind in ("dispatch", "combine") for n in (1, 2)
    )
    f0, f1, f2 = (f"compute layer 1 {which} forward" for which in ("local rows", "chunk 1 of 2", "chunk 2 of 2"))
    forward = [f"launch {d1}", f"launch {d2}", f0, f"wait {d1}", f1, f"launch {c1}", f"wait {d2}", f2, f"launch {c2}"]
    forward += [f"{f0}, FC2", f"wait {c1}", f"wait {c2}"]
    e1, e2, h1, h2 = (f"backward of {name}" for name in (c1, c2, d1, d2))
    b0, b1, b2 = (name.replace("forward", "backward") for name in (f0, f1, f2))
    backward = [f"launch {e1}", f"launch {e2}", b0, f"wait {e1}", b1, f"launch {h1}", f"wait {e2}", b2, f"launch {h2}"]
    backward += ["dw layer 1 fc2", "dw layer 1 fc1", f"wait {h1}", f"wait {h2}"]
    for order in run_ranks(2, order_of_a_step, sizes={"expert_model_parallel_size": 2}):
        assert order == forward + backward


DELAY_MS, ROWS_MS, DW_MS = 100.0, 120.0, 120.0  # an exchange; FC1, FC2 or the backward of a piece; a dW


def planted_waits() -> dict[str, list[float]]:
    """Milliseconds in waits of forward and backward, of the twin and overlapped; and of the whole step."""
    import torch.distributed as dist

    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from fluid_npu.schedule import pipeline
    from fluid_npu.schedule.deferred import DeferredWeights

    def slowed(call: Any, milliseconds: float) -> Any:
        return lambda *args: (time.sleep(milliseconds / 1e3), call(*args))[1]

    DeferredWeights._land = slowed(DeferredWeights._land, DW_MS)  # type: ignore[method-assign]
    pipeline.mlp_up = slowed(pipeline.mlp_up, ROWS_MS)
    pipeline.mlp_down = slowed(pipeline.mlp_down, ROWS_MS)
    pipeline.mlp_backward = slowed(pipeline.mlp_backward, ROWS_MS)

    def step(case: Case, twin: bool) -> tuple[float, float]:
        layer = fluid_layer(replace(case, overlap="full", fuse=False))
        scheduler, x = layer.backward_scheduler, inputs(case, dist.get_rank(), 0)[0]
        scheduler.transport = DelayedTransport(CollectiveTransport(), DELAY_MS)
        with planted_time() as clock, scheduler.serialise() if twin else nullcontext():
            layer(x.requires_grad_())[0].sum().backward()
            return scheduler.get_stats()["exposed_ms"], clock.seconds * 1e3

    cases = {"two chunks": Case(chunks=2), "local": Case(chunks=1, local_first=True)}
    cases["local, two chunks"] = Case(chunks=2, local_first=True)
    return {f"{name} {twin}": list(step(case, twin)) for name, case in cases.items() for twin in (True, False)}


@pytest.mark.host  # the delays are planted on the host
def test_local_rows_hide_the_first_exchange_of_each_direction(run_ranks: Ranks) -> None:
    """The last exchange of the forward is beside their FC2, dW covers that of the backward; else three are exposed."""
    for rank in run_ranks(2, planted_waits, sizes={"expert_model_parallel_size": 2}):
        exposed = {name: round(waits / DELAY_MS, 6) for name, (waits, _) in rank.items()}
        assert exposed == {
            "two chunks True": 8,
            "two chunks False": 3,
            "local True": 4,
            "local False": 0,
            "local, two chunks True": 8,
            "local, two chunks False": 0,
        }
        # Two pieces of each direction, FC1 and FC2 by themselves in the forward, and dW of two weights.
        assert rank["local False"][1] == pytest.approx(6 * ROWS_MS + 2 * DW_MS)
        assert rank["two chunks False"][1] == pytest.approx(6 * ROWS_MS + 2 * DW_MS + 3 * DELAY_MS)


def choices() -> dict[str, str]:
    """Messages of what cannot be had, and the reasons of what was chosen."""
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    first = Case(overlap="full", local_first=True)
    calls: dict[str, Callable[[], Any]] = {
        "dw": lambda: get_fluid_moe_layer_spec(local_first=True),
        "word": lambda: get_fluid_moe_layer_spec(overlap="full", local_first="yes"),  # type: ignore[arg-type]
        "static": lambda: fluid_layer(replace(first, dispatch="static", chunks=2)),
        "allgather": lambda: fluid_layer(replace(first, config={"moe_token_dispatcher_type": "allgather"})),
    }
    found = value_errors(calls)
    for name, case in {"asked": first, "not_asked": Case(overlap="full")}.items():
        value, reason = fluid_layer(case).local_first
        found[name] = f"{value}: {reason}"
    return found


def test_what_is_not_there_is_refused_by_name(run_ranks: Ranks) -> None:
    found = run_ranks(2, choices, sizes={"expert_model_parallel_size": 2})[0]
    assert found["dw"] == "local_first=True: overlap='dw' has no chunks; use overlap='full', or leave it out"
    assert found["word"] == "local_first='yes': allowed are True and False"
    assert found["static"].startswith("chunks=2: dispatch='static' sends all tokens in one piece")
    assert found["allgather"].startswith("local_first=True: moe_token_dispatcher_type='allgather' overlaps nothing")
    assert found["asked"] == "True: as asked" and found["not_asked"] == "False: not asked for"


def alone() -> tuple[bool, str]:
    return tuple(fluid_layer(Case(ep=1, overlap="full", local_first=True)).local_first)


def test_one_rank_has_nothing_to_wait_for(run_ranks: Ranks) -> None:
    assert run_ranks(1, alone, sizes={}) == [(False, "one rank has all experts: no row leaves it")]

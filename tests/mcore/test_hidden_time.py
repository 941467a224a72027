"""Planted milliseconds: what dW covers is hidden, what nothing covers is exposed.

Only planted time passes (``tests/support/clock.py``), so every figure is exact. tests/link measures with a real clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from fluid_npu.schedule import pipeline
from fluid_npu.schedule.deferred import DeferredWeights
from fluid_npu.schedule.definitions import hidden_fraction
from tests.support.clock import planted_time

pytestmark = pytest.mark.host  # the delays are planted on the host

DELAY_MS, DW_MS = 300.0, 200.0  # the second for each of FC1 and FC2: together longer than the delay


def step_times() -> dict[str, Any]:
    """Steps of one MoE layer whose AllToAlls take a planted time and whose dW sleeps instead of computing longer."""
    import torch.distributed as dist
    from megatron.core.transformer.spec_utils import build_module

    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec
    from tests.support.moe import Case, inputs, make_config

    case = Case(fuse=False)
    config = make_config(case)
    transport = DelayedTransport(CollectiveTransport(), DELAY_MS)
    layer = build_module(get_fluid_moe_layer_spec(config, transport=transport).submodules.mlp, config=config)
    layer.set_layer_number(1)
    scheduler = layer.backward_scheduler
    submit = scheduler.submit
    slow = lambda task: replace(task, run=lambda: (time.sleep(DW_MS / 1e3), task.run())[1])
    scheduler.submit = lambda task: submit(slow(task))
    x, _ = inputs(case, dist.get_rank(), 0)

    def step(twin: bool) -> tuple[float, dict[str, float]]:
        scheduler.reset_stats()
        dist.barrier()
        start = time.perf_counter()
        if twin:
            with scheduler.serialise():
                layer(x.requires_grad_())[0].sum().backward()
        else:
            layer(x.requires_grad_())[0].sum().backward()
        return (time.perf_counter() - start) * 1e3, scheduler.get_stats()

    with planted_time():
        return _measured(step)


def _measured(step: Callable[[bool], tuple[float, dict[str, float]]]) -> dict[str, Any]:
    """The second step of each kind, as the first makes what later ones find."""
    (twin_ms, twin), (overlapped_ms, overlapped) = ([step(kind) for _ in range(2)][-1] for kind in (True, False))
    return {"hidden": twin_ms - overlapped_ms, "twin": twin, "overlapped": overlapped}


def test_the_dispatch_backward_hides_behind_planted_dw(run_ranks: Callable[..., list[Any]]) -> None:
    for rank in run_ranks(2, step_times, sizes={"expert_model_parallel_size": 2}):
        assert rank["hidden"] == pytest.approx(DELAY_MS)
        # Dispatch and combine, forward and backward: four exchanges, of which dW covers one.
        assert rank["twin"]["a2a_ms"] == pytest.approx(4 * DELAY_MS)
        assert rank["twin"]["exposed_ms"] == pytest.approx(4 * DELAY_MS)
        assert rank["overlapped"]["exposed_ms"] == pytest.approx(3 * DELAY_MS)
        assert rank["twin"]["dw_ms"] == pytest.approx(2 * DW_MS)


def model_times() -> dict[str, Any]:
    """Steps of a GPT of two MoE layers with planted AllToAlls, in which dW of attention's linears sleeps."""
    import torch.distributed as dist

    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from fluid_npu.schedule.live import get_backward_scheduler
    from tests.support.gpt import Run, batch, make_config, make_model

    transport = DelayedTransport(CollectiveTransport(), DELAY_MS)
    run = Run(config={"gradient_accumulation_fusion": False}, spec={"transport": transport, "carry_over": True})
    model = make_model(run, make_config(run))
    scheduler = get_backward_scheduler(model)
    submit = scheduler.submit
    slow = lambda task: replace(task, run=lambda: (time.sleep(DW_MS / 1e3), task.run())[1])
    scheduler.submit = lambda task: submit(slow(task) if ".linear_" in task.name else task)

    def step(twin: bool) -> tuple[float, dict[str, float]]:
        scheduler.reset_stats()
        dist.barrier()
        start = time.perf_counter()
        with scheduler.serialise() if twin else nullcontext():
            model(**batch(dist.get_rank(), 0, 0)).float().mean().backward()
        return (time.perf_counter() - start) * 1e3, scheduler.get_stats()

    with planted_time():
        return _measured(step)


def test_the_combine_backward_hides_behind_dw_of_qkv_and_proj(run_ranks: Callable[..., list[Any]]) -> None:
    """Of eight exchanges the upper layer's linears cover one, the combine of the layer below; 400 ms of dW for 300."""
    for rank in run_ranks(2, model_times, sizes={"expert_model_parallel_size": 2}, timeout=280):
        assert rank["hidden"] == pytest.approx(DELAY_MS)
        assert rank["twin"]["exposed_ms"] == pytest.approx(8 * DELAY_MS)
        assert rank["overlapped"]["exposed_ms"] == pytest.approx(7 * DELAY_MS)
        assert rank["overlapped"]["dw_ms"] == pytest.approx(2 * DW_MS)


CHUNK_DELAY_MS, CHUNK_MS, CHUNK_DW_MS = 100.0, 180.0, 100.0  # an exchange, a chunk's forward or backward, a dW


def chunk_times() -> dict[str, Any]:
    """Steps of one MoE layer in two chunks with planted AllToAlls, chunks and dW; and the coverage of a twin."""
    import torch.distributed as dist

    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from fluid_npu.device import get_device
    from fluid_npu.schedule.hidden import gathered_coverage
    from fluid_npu.schedule.lanes import Lanes
    from tests.support.moe import Case, fluid_layer, inputs

    layer = fluid_layer(Case(fuse=False, overlap="full", chunks=2))
    scheduler, x = layer.backward_scheduler, inputs(Case(), dist.get_rank(), 0)[0]
    scheduler.transport = DelayedTransport(CollectiveTransport(), CHUNK_DELAY_MS)
    land = DeferredWeights._land
    DeferredWeights._land = lambda *args: (time.sleep(CHUNK_DW_MS / 1e3), land(*args))[1]  # type: ignore[method-assign]
    forward = pipeline.mlp_up
    backward = pipeline.mlp_backward
    pipeline.mlp_up = lambda *args: (time.sleep(CHUNK_MS / 1e3), forward(*args))[1]
    pipeline.mlp_backward = lambda *args: (time.sleep(CHUNK_MS / 1e3), backward(*args))[1]

    def step(twin: bool) -> tuple[float, dict[str, float]]:
        scheduler.reset_stats()
        dist.barrier()
        start = time.perf_counter()
        with scheduler.serialise() if twin else nullcontext():
            layer(x.requires_grad_())[0].sum().backward()
        return (time.perf_counter() - start) * 1e3, scheduler.get_stats()

    with planted_time():
        measured = _measured(step)
        clocks = Lanes(scheduler, get_device("cpu").value)
        with scheduler.serialise(), clocks:
            layer(x.requires_grad_())[0].sum().backward()
    exchanges = clocks.take()
    beside = [[name for name, _ in one.beside] for one in exchanges]
    return {**measured, "beside": beside, "covered": gathered_coverage(exchanges)}


def test_chunks_hide_each_others_exchanges(run_ranks: Callable[..., list[Any]]) -> None:
    """Of eight exchanges the first dispatch, the last combine and its reverse, the first, stay exposed."""
    for rank in run_ranks(2, chunk_times, sizes={"expert_model_parallel_size": 2}):
        assert rank["hidden"] == pytest.approx(5 * CHUNK_DELAY_MS)
        assert rank["twin"]["exposed_ms"] == pytest.approx(8 * CHUNK_DELAY_MS)
        assert rank["overlapped"]["exposed_ms"] == pytest.approx(3 * CHUNK_DELAY_MS)
        forward, backward = ([f"layer 1 chunk {n} of 2 {way}" for n in (1, 2)] for way in ("forward", "backward"))
        dw = ["layer 1 fc2", "layer 1 fc1"]
        assert rank["beside"] == [[], forward[:1], forward[1:], [], [], backward[:1], [*backward[1:], *dw], dw]
        covered = rank["covered"]
        assert covered.coverable_ms == pytest.approx(5 * CHUNK_DELAY_MS)
        assert covered.beside_ms == pytest.approx(4 * CHUNK_MS + 2 * CHUNK_DW_MS)
        assert covered.transfer_ms == pytest.approx(8 * CHUNK_DELAY_MS)
        assert hidden_fraction(rank["hidden"], 0.0, covered) == pytest.approx(1.0)

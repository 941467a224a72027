"""Two halves of a micro-batch with planted milliseconds: which exchanges hide, and that the planner expects that step.

Only planted time passes (``tests/support/clock.py``), so every figure is exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from fluid_npu.schedule.planner import Costs, Plan, expected_ms
from tests.support.clock import planted_time

pytestmark = pytest.mark.host  # the delays are planted on the host

#: Of one half: an exchange, attention and experts forward and backward, and each of two dW.
EXCHANGE_MS, ATTENTION_MS, EXPERTS_MS, DW_MS = 100.0, 100.0, 150.0, 60.0


def nap(milliseconds: float) -> None:
    time.sleep(milliseconds / 1e3)


def planted_layer(halves: bool) -> Any:
    """A GPT of one layer whose exchanges, attention, experts and dW take planted time."""
    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from tests.support.gpt import Run, make_config, make_model

    transport = DelayedTransport(CollectiveTransport(), EXCHANGE_MS)
    spec = {"interleave_batches": halves, "transport": transport}
    run = Run(config={"num_layers": 1, "gradient_accumulation_fusion": False}, spec=spec)
    model = make_model(run, make_config(run))
    layer = model.decoder.layers[0]
    times = 1 if halves else 2
    for module, ms in ((layer.self_attention, ATTENTION_MS), (layer.mlp.experts, EXPERTS_MS)):
        module.register_forward_hook(lambda *_, ms=ms: nap(times * ms))
        module.register_full_backward_hook(lambda *_, ms=ms: nap(times * ms))
    scheduler = layer.mlp.backward_scheduler
    submit = scheduler.submit
    slow = lambda task: replace(task, run=lambda: (nap(times * DW_MS), task.run())[1])
    scheduler.submit = lambda task: submit(slow(task) if " fc" in task.name else task)
    return model, scheduler


def step_times(halves: bool) -> dict[str, tuple[float, float]]:
    """Forward and backward of a step and of its serialised twin, and what of their exchanges was exposed."""
    import torch.distributed as dist

    from tests.support.gpt import batch

    model, scheduler = planted_layer(halves)
    found = {}
    with planted_time():
        for name in ("warm-up", "twin", "step"):
            scheduler.reset_stats()
            dist.barrier()
            start = time.perf_counter()
            with scheduler.serialise() if name == "twin" else nullcontext():
                model(**batch(dist.get_rank(), 0, 0)).float().mean().backward()
            found[name] = (time.perf_counter() - start) * 1e3, scheduler.get_stats()["exposed_ms"]
    return found


COMPUTE_MS = 4 * (ATTENTION_MS + EXPERTS_MS + DW_MS)


def test_six_of_eight_exchanges_of_two_halves_hide(run_ranks: Callable[..., list[Any]]) -> None:
    """The second half's combine has nothing of its layer beside it, forward or backward."""
    for found in run_ranks(2, step_times, True, sizes={"expert_model_parallel_size": 2}):
        assert found["twin"] == pytest.approx((COMPUTE_MS + 8 * EXCHANGE_MS, 8 * EXCHANGE_MS))
        assert found["step"] == pytest.approx((COMPUTE_MS + 2 * EXCHANGE_MS, 2 * EXCHANGE_MS))


def test_one_of_four_exchanges_of_the_whole_hides(run_ranks: Callable[..., list[Any]]) -> None:
    """Beside the backward of the dispatch there is dW, 240 ms for 100; beside the others nothing."""
    for found in run_ranks(2, step_times, False, sizes={"expert_model_parallel_size": 2}):
        assert found["twin"] == pytest.approx((COMPUTE_MS + 4 * EXCHANGE_MS, 4 * EXCHANGE_MS))
        assert found["step"] == pytest.approx((COMPUTE_MS + 3 * EXCHANGE_MS, 3 * EXCHANGE_MS))


def test_the_planner_expects_the_planted_step() -> None:
    """Exchanges of no bytes, of which each takes as long; what is around the experts counts in no plan."""
    costs = Costs(
        alpha_ms=EXCHANGE_MS,
        beta_ms_per_mib=0.0,
        dispatch_mib=1.0,
        combine_mib=1.0,
        forward_ms=2 * EXPERTS_MS,
        dx_ms=2 * EXPERTS_MS,
        dw_ms=4 * DW_MS,
        chunk_ms=0.0,
        hiding=1.0,
        around_forward_ms=2 * ATTENTION_MS,
        around_backward_ms=2 * ATTENTION_MS,
    )
    halves, whole = Plan(overlap="dw", interleave_batches=True), Plan(overlap="dw")
    assert expected_ms(costs, halves) == pytest.approx(COMPUTE_MS - 4 * ATTENTION_MS + 2 * EXCHANGE_MS)
    assert expected_ms(costs, whole) == pytest.approx(COMPUTE_MS - 4 * ATTENTION_MS + 3 * EXCHANGE_MS)

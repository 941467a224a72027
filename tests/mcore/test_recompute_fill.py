"""A recomputed layer's AllToAlls are flights too: dW of the layer above runs in them, and no bit changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import pytest

from fluid_npu.schedule.scheduler import BackwardScheduler
from tests.support.clock import planted_time
from tests.support.gpt import Run, batch, check_trained, fill, make_config, make_model, same_bits, train_all
from tests.support.moe import ForcedRouter
from tests.support.order_of_steps import exchanges_of_clean_steps, recorded_steps

Ranks = Callable[..., list[Any]]
FP32 = 1e-5
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
LATE: dict[str, Any] = {"delay_wgrad_compute": True, "overlap_grad_reduce": True, "bucket_size": 2000}
SHARED = {"moe_shared_expert_intermediate_size": 24}
CARRY = {"carry_over": True}
CHUNKS = {**CARRY, "overlap": "full", "chunks": 2}
BASE = Run(micro_batches=2, ddp=LATE, spec=CARRY, config={"moe_router_topk": 3})
RUNS = {
    "full": replace(BASE, config={**BASE.config, **FULL}),
    "moe": replace(BASE, config={**BASE.config, **MOE, **SHARED}),
    "chunks": replace(BASE, config={**BASE.config, **FULL}, spec={**CHUNKS, "local_first": True}),
}


def gradients(run: Run, how: str, empty: int) -> dict[str, Any]:
    """Gradients of two micro-batches, 'filled', as 'twin' of that, or 'unfilled': recomputed flights left alone.

    ``empty``: so many experts, the last, get no token; the half of them makes a rank without rows.
    """
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from fluid_npu.mcore.convert import gradients_by_name
    from fluid_npu.schedule.live import get_backward_scheduler

    config = make_config(run)
    model = make_model(run, config)
    fill(model, run)
    for layer in model.decoder.layers:
        ForcedRouter(layer.mlp, empty)
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **run.ddp}), model
    )
    scheduler = get_backward_scheduler(ddp)
    scheduler.recorder.enabled = True
    if how == "unfilled":
        scheduler.fill_again = lambda name, gaps: None  # type: ignore[method-assign]
    ddp.zero_grad_buffer()
    for micro in range(run.micro_batches):
        with ExitStack() as stack:
            if micro < run.micro_batches - 1:
                stack.enter_context(ddp.no_sync())
            if how == "twin":
                stack.enter_context(scheduler.serialise())
            ddp(**batch(dist.get_rank(), 0, micro)).float().mean().backward()
        assert scheduler.pending == 0, "dW left over when backward() returned"
    finalize_model_grads([ddp])
    stats = scheduler.get_stats()
    assert stats["total_dw_tasks"] == stats["completed_dw_tasks"]
    return {
        "grads": {name: grad.clone() for name, grad in gradients_by_name(ddp).items()},
        "regions": [(r.name, r.detail["region"]) for r in scheduler.recorder.take() if r.kind == "dw"],
    }


def all_ways() -> dict[str, dict[str, Any]]:
    return {
        f"{name} {empty}": {how: gradients(run, how, empty) for how in ("filled", "twin", "unfilled")}
        for name, run in RUNS.items()
        for empty in (0, 4)
    }


def test_filled_equals_its_twin_and_unfilled_bitwise(run_ranks: Ranks) -> None:
    """Uneven routing, and a rank without tokens. Where each task ran is the same on both ranks."""
    first, second = run_ranks(2, all_ways, sizes={"expert_model_parallel_size": 2}, timeout=280)
    for rank in (first, second):
        for name, ways in rank.items():
            for other in ("twin", "unfilled"):
                assert not same_bits(ways["filled"]["grads"], ways[other]["grads"]), (name, other)
            assert ways["filled"]["regions"] == ways["twin"]["regions"]
            assert not any("recompute" in region for _, region in ways["unfilled"]["regions"])
    for name in first:
        assert first[name]["filled"]["regions"] == second[name]["filled"]["regions"]


def test_what_runs_beside_which_exchange(run_ranks: Ranks) -> None:
    """The upper layer leaves FC2, the router and attention's two linears: two, one and one."""
    of_layer_1 = "AllToAll of layer 1"
    wanted = {
        "layer 2 fc2": f"recompute of moe_dispatch {of_layer_1}",
        "layer 2 router": f"recompute of moe_dispatch {of_layer_1}",
        "layer 2 self_attention.linear_proj": f"recompute of moe_combine {of_layer_1}",
        "layer 2 self_attention.linear_qkv": f"backward of moe_combine {of_layer_1}",
        "layer 1 fc1": f"backward of moe_dispatch {of_layer_1}",
    }
    runs = [replace(RUNS["full"], impl="stock", ddp={}, spec={}), RUNS["full"], replace(RUNS["full"], impl="twin")]
    for stock, ours, twin in run_ranks(2, train_all, runs, sizes={"expert_model_parallel_size": 2}, timeout=200):
        check_trained(ours, stock, twin, FP32)
        assert {name: ours["regions"][name] for name in wanted} == wanted


def test_the_order_of_a_training_step_is_clean(run_ranks: Ranks) -> None:
    results = run_ranks(2, recorded_steps, RUNS["full"], sizes={"expert_model_parallel_size": 2})
    # Steps x micro-batches x layers x ranks: counts and two exchanges of each forward, of which there are two, and two
    # of the backward.
    assert exchanges_of_clean_steps(results) == 2 * 2 * 2 * 2 * (2 * 3 + 2)


def after_a_failure() -> tuple[str, int, list[str]]:
    """A backward that fails in a recomputed layer, then a good one: what is left over, and where dW ran."""
    import torch.distributed as dist

    run = replace(RUNS["full"], ddp={}, config={**RUNS["full"].config, "gradient_accumulation_fusion": False})
    model = make_model(run, make_config(run))
    scheduler: BackwardScheduler = model.decoder.layers[0].mlp.backward_scheduler
    step = lambda: model(**batch(dist.get_rank(), 0, 0)).float().mean().backward()
    step()

    def fail(grad: Any) -> None:
        raise RuntimeError("planted")

    handle = model.decoder.layers[0].mlp.experts.weight1.register_hook(fail)
    try:
        step()
    except RuntimeError as error:
        message = str(error)
    handle.remove()
    scheduler._queue.clear()  # as a failure in a task itself would
    scheduler.recorder.enabled = True
    step()
    return message, scheduler.pending, [r.detail["region"] for r in scheduler.recorder.take() if r.kind == "dw"]


def test_a_failed_backward_leaves_nothing_open(run_ranks: Ranks) -> None:
    for message, pending, regions in run_ranks(2, after_a_failure, sizes={"expert_model_parallel_size": 2}):
        assert "planted" in message and pending == 0
        assert "recompute of moe_dispatch AllToAll of layer 1" in regions


DELAY_MS, DW_MS = 200.0, 250.0


def planted_waits(granularity: dict[str, Any], filled: bool) -> dict[str, float]:
    """Milliseconds in waits of the backward of a GPT of two recomputed layers with delayed AllToAlls.

    Two tasks, of attention's linears in the upper layer, sleep for longer than an exchange each.
    """
    import torch.distributed as dist

    from fluid_npu.comm.transports import CollectiveTransport, DelayedTransport
    from fluid_npu.schedule.live import get_backward_scheduler

    transport = DelayedTransport(CollectiveTransport(), DELAY_MS)
    plain = {"gradient_accumulation_fusion": False, **granularity}
    run = Run(config=plain, spec={"transport": transport, "carry_over": True})
    model = make_model(run, make_config(run))
    scheduler = get_backward_scheduler(model)
    submit = scheduler.submit
    slow = lambda task: replace(task, run=lambda: (time.sleep(DW_MS / 1e3), task.run())[1])
    scheduler.submit = lambda task: submit(slow(task) if ".linear_" in task.name else task)
    if not filled:
        scheduler.fill_again = lambda name, gaps: None

    def waits(twin: bool) -> float:
        with scheduler.serialise() if twin else nullcontext():
            loss = model(**batch(dist.get_rank(), 0, 0)).float().mean()
            scheduler.reset_stats()
            loss.backward()
        return scheduler.get_stats()["exposed_ms"]

    with planted_time():
        return {"twin": waits(True), "overlapped": waits(False)}


@pytest.mark.host  # the delays are planted on the host
@pytest.mark.parametrize(
    ("granularity", "filled", "exposed"),
    [(FULL, True, 6), (MOE, True, 6), (FULL, False, 8), (MOE, False, 7)],
    ids=["full", "moe", "full_left_alone", "moe_left_alone"],
)
def test_exchanges_of_a_recomputed_layer_are_hidden(
    granularity: dict[str, Any], filled: bool, exposed: int, run_ranks: Ranks
) -> None:
    """Of eight exchanges in the backward so many stay exposed.

    Left alone, both tasks run in the combine's backward, or in none where the upper layer's backward ends before.
    """
    for rank in run_ranks(2, planted_waits, granularity, filled, sizes={"expert_model_parallel_size": 2}):
        assert rank["twin"] == pytest.approx(8 * DELAY_MS)
        assert rank["overlapped"] == pytest.approx(exposed * DELAY_MS)

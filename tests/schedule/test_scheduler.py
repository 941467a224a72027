"""The queue: what runs where, what never stays behind, and which scheduler belongs to which model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fluid_npu.schedule.live import get_backward_scheduler, register
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.schedule.task import DWTask
from tests.support.device import device, here

Ranks = Callable[..., list[Any]]


class _Queues(torch.autograd.Function):
    """A node whose backward submits tasks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, submit: Callable[[], None]) -> torch.Tensor:
        ctx.submit = submit
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.submit()
        return grad, None


def _task(name: str, done: list[str], carry: bool = False) -> DWTask:
    return DWTask(name=name, run=lambda: done.append(name), shape=(2, 3, 5), device=device(), carry=carry)


def _backward(submit: Callable[[], None]) -> None:
    _Queues.apply(here(torch.ones(1, requires_grad=True)), submit).sum().backward()


def test_overlap_off_runs_each_task_at_once() -> None:
    scheduler, done = BackwardScheduler("off"), []
    scheduler.submit(_task("a", done))
    assert done == ["a"] and scheduler.pending == 0 and scheduler.serialised


def test_tasks_run_in_order_and_carried_ones_wait_for_the_combine() -> None:
    scheduler, done = BackwardScheduler(carry_over=True), []
    states = []

    def submit() -> None:
        scheduler.submit(_task("fc2", done, carry=True))
        scheduler.submit(_task("fc1", done))
        scheduler.fill("moe_dispatch", "dispatch")
        states.append(list(done))
        scheduler.fill("moe_combine", "combine")
        states.append(list(done))

    _backward(submit)
    assert states == [["fc1"], ["fc1", "fc2"]]
    stats = scheduler.get_stats()
    assert stats["total_dw_tasks"] == stats["completed_dw_tasks"] == 2
    assert stats["dw_ms"] > 0
    assert stats["dw_flops"] == 2 * 2 * 2 * 3 * 5


def test_nothing_is_left_when_backward_returns() -> None:
    scheduler, done = BackwardScheduler(), []
    _backward(lambda: scheduler.submit(_task("a", done)))
    assert done == ["a"] and scheduler.pending == 0


def test_nothing_is_left_after_a_reentrant_backward() -> None:
    from torch.utils.checkpoint import checkpoint

    scheduler, done = BackwardScheduler(), []
    x = here(torch.ones(1, requires_grad=True))
    body = lambda t: _Queues.apply(t, lambda: scheduler.submit(_task("a", done)))
    checkpoint(body, x, use_reentrant=True).sum().backward()
    assert done == ["a"] and scheduler.pending == 0


def test_a_failing_task_leaves_no_work_for_the_next_backward() -> None:
    scheduler, done = BackwardScheduler(), []

    def fail() -> None:
        raise RuntimeError("no memory for dW")

    def submit() -> None:
        scheduler.submit(DWTask(name="bad", run=fail, shape=(1, 1, 1), device=device()))
        scheduler.submit(_task("later", done))

    with pytest.raises(RuntimeError, match="no memory for dW"):
        _backward(submit)
    assert scheduler.pending == 0 and done == []
    _backward(lambda: scheduler.submit(_task("next", done)))
    assert done == ["next"]


def test_a_full_queue_runs_its_oldest_task_and_says_so() -> None:
    scheduler, done = BackwardScheduler(carry_over=True, queue_limit=2), []
    states = []

    def submit() -> None:
        for name in "abc":
            task = _task(name, done, carry=True)
            scheduler.submit(replace(task, held_bytes=100))
            states.append((scheduler.pending, list(done)))

    _backward(submit)
    assert states == [(1, []), (2, []), (2, ["a"])] and done == ["a", "b", "c"]
    stats = scheduler.get_stats()
    assert (stats["queue_peak_tasks"], stats["queue_peak_bytes"], stats["queue_full"]) == (2, 200, 1)
    scheduler.reset_stats()
    assert scheduler.get_stats()["queue_peak_bytes"] == 0
    with pytest.raises(ValueError, match="queue_limit=0: at least 1"):
        BackwardScheduler(queue_limit=0)


def test_what_shall_not_wait_is_counted_and_overtakes_the_queue() -> None:
    scheduler, done = BackwardScheduler(carry_over=True), []
    scheduler.recorder.enabled = True

    def submit() -> None:
        scheduler.submit(_task("queued", done, carry=True))
        scheduler.run_now(_task("now", done), "all-reduce of dX")

    _backward(submit)
    assert done == ["now", "queued"]
    regions = [record.detail["region"] for record in scheduler.recorder.take()]
    assert regions == ["all-reduce of dX", "end of backward"]
    assert scheduler.get_stats()["completed_dw_tasks"] == 2


def test_a_combine_follows_only_above_the_lowest_moe_layer_of_the_same_chunk() -> None:
    scheduler = BackwardScheduler()
    scheduler.lowest = {0: 2, 4: 6}
    assert [scheduler.combine_below(0, number) for number in (1, 2, 3, 4)] == [False, False, True, True]
    assert [scheduler.combine_below(4, number) for number in (5, 6, 7)] == [False, False, True]
    assert not scheduler.combine_below(8, 9), "a chunk without MoE layers has no combine"
    assert scheduler.lowest_layers == {2, 6}


@pytest.mark.parametrize("overlap", ["on", "Full", ""])
def test_an_overlap_that_does_not_exist_is_refused(overlap: str) -> None:
    with pytest.raises(ValueError, match="allowed are off, dw, full"):
        BackwardScheduler(overlap)


def test_serialise_holds_within_the_context_only() -> None:
    scheduler = BackwardScheduler()
    with scheduler.serialise():
        assert scheduler.serialised
    assert not scheduler.serialised


def test_the_only_live_scheduler_is_found_and_several_are_named() -> None:
    gc.collect()
    first = register(BackwardScheduler(name="model A"))
    assert get_backward_scheduler() is first
    second = register(BackwardScheduler(name="model B"))
    with pytest.raises(LookupError, match="2 schedulers are alive .*model A; model B.*pass the model"):
        get_backward_scheduler()
    del second
    gc.collect()
    assert get_backward_scheduler() is first


def test_a_model_without_fluid_layers_is_named() -> None:
    with pytest.raises(LookupError, match=r"get_backward_scheduler\(Linear\): no Fluid layer"):
        get_backward_scheduler(torch.nn.Linear(1, 1))


def two_models() -> dict[str, Any]:
    """Two models from one spec and one configuration."""
    from tests.support.gpt import Run, make_config, make_model

    run = Run()
    config = make_config(run)
    from megatron.core.models.gpt import GPTModel

    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec

    spec = get_fluid_moe_layer_spec(config)
    models = [
        here(GPTModel(config, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="rope"))
        for _ in range(2)
    ]
    schedulers = [get_backward_scheduler(model) for model in models]
    try:
        get_backward_scheduler()
        message = ""
    except LookupError as error:
        message = str(error)
    layers = [{id(m.backward_scheduler) for m in model.modules() if hasattr(m, "token_dispatcher")} for model in models]
    again = make_model(run, config)
    return {
        "different": schedulers[0] is not schedulers[1],
        "one_each": [len(ids) for ids in layers],
        "message": message,
        "names": [s.name for s in schedulers],
        "third": get_backward_scheduler(again) not in schedulers,
    }


def test_two_models_from_one_spec_have_their_own_schedulers(run_ranks: Ranks) -> None:
    result = run_ranks(2, two_models, sizes={"expert_model_parallel_size": 2})[0]
    assert result["different"] and result["third"] and result["one_each"] == [1, 1]
    assert all(name in result["message"] for name in result["names"])

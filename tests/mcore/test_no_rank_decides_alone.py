"""Ranks with opposite loads and slow clocks issue the same collectives in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.gpt import Run, batch, fill, make_config, make_model

Ranks = Callable[..., list[Any]]


class _CollectiveLog:
    """Wraps what torch.distributed offers and writes down each call: name and size of the group, never of the data."""

    NAMES = (
        "all_reduce",
        "all_to_all_single",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "broadcast",
        "all_gather",
    )

    def __init__(self) -> None:
        import torch.distributed as dist

        self.calls: list[tuple[str, int]] = []
        for name in self.NAMES:
            setattr(dist, name, self._logged(name, getattr(dist, name)))

    def _logged(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            import torch.distributed as dist

            self.calls.append((name, dist.get_world_size(kwargs.get("group"))))
            return original(*args, **kwargs)

        return call


def log_of(load: str, slow_rank: int, spec: dict[str, Any]) -> dict[str, Any]:
    """Trains two steps in which all tokens go to experts of one rank; one rank sleeps before every launch and dW."""
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from fluid_npu.schedule.live import get_backward_scheduler

    run = Run(config={"num_layers": 3}, spec=spec)
    config = make_config(run)
    model = make_model(run, config)
    fill(model, run)
    _force_routing(model, load)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        bucket_size=2000,
        delay_wgrad_compute=spec.get("carry_over", False),
    )
    ddp = DistributedDataParallel(config, ddp_config, model)
    scheduler = get_backward_scheduler(ddp)
    scheduler.recorder.enabled = True
    if dist.get_rank() == slow_rank:
        _slow_down(scheduler)
    log = _CollectiveLog()
    for step in range(2):
        ddp.zero_grad_buffer()
        ddp(**batch(dist.get_rank(), step, 0)).float().mean().backward()
        finalize_model_grads([ddp])
    record = [(r.kind, r.name) for r in scheduler.recorder.take()]
    return {"calls": log.calls, "record": record, "rows": scheduler.get_stats()["dw_flops"]}


def _force_routing(model: Any, load: str) -> None:
    """All tokens to the first or the last experts: one rank of two gets everything, the other nothing."""
    for module in model.modules():
        if hasattr(module, "router"):
            experts = module.router.weight.shape[0]
            bias = module.router.weight.new_zeros(experts)
            bias[: experts // 2] = {"first": 100.0, "last": -100.0, "even": 0.0}[load]
            original = module.router.gating
            module.router.gating = lambda x, original=original, bias=bias: original(x) + bias


def _slow_down(scheduler: Any) -> None:
    run, start = scheduler._run, scheduler.transport.start
    scheduler._run = lambda *given, **more: (time.sleep(0.01), run(*given, **more))[1]
    scheduler.transport.start = lambda *a: (time.sleep(0.01), start(*a))[1]


@pytest.mark.parametrize(
    "spec", [{}, {"carry_over": True}, {"dispatch": "once-per-rank"}, {"overlap": "full"}], ids=str
)
def test_collectives_do_not_depend_on_load_or_clock(spec: dict[str, Any], run_ranks: Ranks) -> None:
    sizes = {"expert_model_parallel_size": 2}
    runs = [
        run_ranks(2, log_of, load, slow, spec, sizes=sizes) for load, slow in (("first", 0), ("last", 0), ("even", 1))
    ]
    first = runs[0][0]
    assert len(first["calls"]) > 20
    for ranks in runs:
        for rank in ranks:
            assert rank["calls"] == first["calls"]
            assert rank["record"] == first["record"]
    # The loads really were opposite: one rank had no row at all.
    assert runs[0][1]["rows"] < runs[0][0]["rows"] and runs[1][0]["rows"] < runs[1][1]["rows"]

"""What a mutant is run on: overlapped schedules on two ranks over gloo, with everything that can go wrong looked at.

``run(mutant)`` makes the change, runs the parts and gives what a right engine gives always: digests of losses and
gradients, the order of weight gradients and where they ran, planted times that must appear in the statistics. And the
order record. fluid_npu may be imported only after the change was made.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

from tests.support.mutation import Mutant, install

START_MS, DELAY_MS, DW_MS = 2.0, 4.0, 2.0
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
#: Tokens once per rank, rows that stay here before the others.
IN_CHUNKS: dict[str, Any] = {"overlap": "full", "chunks": 2, "local_first": True, "dispatch": "once-per-rank"}


def run(mutant: Mutant | None) -> tuple[dict[str, Any], list[Any]]:
    """(results by name, entries of the order record) of this rank."""
    import torch
    import torch.distributed as dist

    if mutant is not None:
        install(mutant)
    import fluid_npu

    fluid_npu.adapt(["cpu"])
    from fluid_npu.comm.guard import watch
    from fluid_npu.order.recorder import OrderRecorder

    # Fresh memory holds NaN: what is read before it was written shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    results: dict[str, Any] = {}
    parts = {
        "training": lambda recorder: training(recorder),
        "recomputed": lambda recorder: training(recorder, config={"moe_router_topk": 3, **RECOMPUTED}),
        "training in chunks": lambda recorder: training(recorder, overlap="full", chunks=2, local_first=True),
        "twin": lambda recorder: layer(recorder, twin=True),
        "off": lambda recorder: layer(recorder, overlap="off"),
        "chunks": lambda recorder: layer(recorder, overlap="full", chunks=2),
        "twin in chunks": lambda recorder: layer(recorder, twin=True, overlap="full", chunks=2),
        "chunks of tokens": lambda recorder: layer(recorder, **IN_CHUNKS, chunks_of="tokens"),
        "chunks of experts": lambda recorder: layer(recorder, **IN_CHUNKS, chunks_of="experts"),
        "expert tensor parallel": lambda recorder: layer(recorder, etp=2),
        "dispatcher": lambda recorder: plain_dispatcher(),
        "exchange": lambda recorder: plain_exchange(),
        "queue": lambda recorder: left_over(),
        "grouped matmul": lambda recorder: fused_gmm(),
    }
    with OrderRecorder(dist.get_rank(), lambda: watch.current.name if watch.current else "") as recorder:
        for name, part in parts.items():
            groups(2 if name == "expert tensor parallel" else 1)
            results.update({f"{name}: {key}": value for key, value in part(recorder).items()})
    return results, recorder.entries


def groups(etp: int) -> None:
    """Megatron's process groups: two expert-parallel or two expert-tensor-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=1 if etp == 2 else 2, expert_tensor_parallel_size=etp
    )
    model_parallel_cuda_manual_seed(7)


def transport(recorder: Any) -> Any:
    """One that does what its contract says and no more, after a planted delay."""
    from fluid_npu.comm.transports import DelayedTransport
    from tests.support.promise import PromiseTransport

    delayed = DelayedTransport(PromiseTransport(recorder), DELAY_MS)
    start = delayed.start
    delayed.start = lambda *args: (time.sleep(START_MS / 1e3), start(*args))[1]  # type: ignore[method-assign]
    return delayed


def training(recorder: Any, config: dict[str, Any] | None = None, **engine: Any) -> dict[str, Any]:
    """Two steps of two micro-batches of a small GPT; FC2 and router carried over, gradients reduced as they come."""
    from tests.support import gpt

    late = {"delay_wgrad_compute": True, "overlap_grad_reduce": True}
    spec = {"carry_over": True, "transport": transport(recorder), **engine}
    slow_tasks()
    run = gpt.Run(steps=2, micro_batches=2, spec=spec, ddp=late, config=config or {})
    done = gpt.train(run)
    values = {"losses": done["losses"], "norms": done["norms"], "grads": digests(done["grads"])}
    times = planted(done["stats"])
    if config or engine:
        times = _without_waits(times)
    return {**values, "regions": done["regions"], "order": done["order"], **times}


def slow_tasks() -> None:
    """Every dW sleeps a little before it computes, so that a clock that is started or stopped wrongly shows."""
    from fluid_npu.schedule.scheduler import BackwardScheduler

    for name in ("submit", "run_now"):
        plain = getattr(BackwardScheduler, name)
        if hasattr(plain, "slow"):
            continue

        def slow(self: Any, task: Any, *more: Any, plain: Any = plain) -> None:
            plain(self, replace(task, run=lambda: (time.sleep(DW_MS / 1e3), task.run())[1]), *more)

        slow.slow = True  # type: ignore[attr-defined]
        setattr(BackwardScheduler, name, slow)


def planted(stats: dict[str, float]) -> dict[str, Any]:
    """Counters, and whether the planted times are in the measured ones."""
    tasks = stats["total_dw_tasks"]
    at_once = (START_MS + DELAY_MS) * stats["a2a_count"] <= stats["a2a_ms"]
    return {
        "counters": {name: stats[name] for name in ("total_dw_tasks", "completed_dw_tasks", "a2a_count", "a2a_bytes")},
        "dW took its time": stats["dw_ms"] >= DW_MS * tasks,
        "exchanges were waited for at once": at_once,
        # Forward exchanges have nothing beside them.
        "waits took their time": stats["exposed_ms"] >= DELAY_MS * stats["a2a_count"] / 4,
    }


def layer(recorder: Any, twin: bool = False, **changes: Any) -> dict[str, Any]:
    """Forward and backward of one MoE layer; gradients come back through autograd."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from fluid_npu.mcore.layer_spec import get_fluid_moe_layer_spec
    from tests.support import moe

    etp = changes.pop("etp", 1)
    case = moe.Case(fuse=False, ep=2 // etp, etp=etp, experts=4)
    config = moe.make_config(case)
    spec = get_fluid_moe_layer_spec(config, transport=transport(recorder), **changes)
    mlp = moe._built(spec.submodules.mlp, config)
    mlp.set_layer_number(1)
    weights = moe.all_weights(case)
    if etp == 1:
        moe.load(mlp, weights, case, parallel_state.get_expert_model_parallel_rank())
    scheduler = mlp.backward_scheduler
    scheduler.recorder.enabled = True
    x, g = moe.inputs(case, dist.get_rank(), 0)
    x.requires_grad_()
    if twin:
        with scheduler.serialise():
            out = mlp(x)[0]
            (out * g).sum().backward()
    else:
        out = mlp(x)[0]
        (out * g).sum().backward()
    grads = {name: parameter.grad for name, parameter in mlp.named_parameters()}
    records = scheduler.recorder.take()
    tasks = [(record.name, record.detail["region"]) for record in records if record.kind == "dw"]
    order = [(record.kind, record.name) for record in records]
    found = {"out": out.detach(), "dx": x.grad, **grads}
    del torch
    times = planted(scheduler.get_stats())
    if changes.get("overlap") == "full" and not twin:
        times = _without_waits(times)
    return {"values": digests(found), "tasks": tasks, "order": order, "left": scheduler.pending, **times}


def _without_waits(times: dict[str, Any]) -> dict[str, Any]:
    """Where much runs beside an exchange it is chance how much is left to wait for."""
    return {name: value for name, value in times.items() if "wait" not in name}


def plain_dispatcher() -> dict[str, Any]:
    """A user's dispatch() and combine()."""
    import torch
    import torch.distributed as dist

    from tests.support.dispatchers import make_dispatcher
    from tests.support.moe import HIDDEN, Case

    case = Case(ep=2)
    dispatcher = make_dispatcher(case)
    generator = torch.Generator().manual_seed(dist.get_rank())
    hidden = torch.randn(case.tokens, 1, HIDDEN, generator=generator, requires_grad=True)
    scores = torch.rand(case.tokens, case.experts, generator=generator)
    routing = torch.zeros_like(scores).scatter_(1, scores.topk(case.topk)[1], 1.0).bool()
    probs = (scores * routing).requires_grad_()
    tokens, counts, _ = dispatcher.dispatch(hidden, routing, probs)
    out = dispatcher.combine(tokens * 2)
    out.sum().backward()
    return digests({"out": out.detach(), "counts": counts, "grad": hidden.grad})


def plain_exchange() -> dict[str, Any]:
    """``fluid_all_to_all`` by itself, both forms."""
    import torch
    import torch.distributed as dist

    from fluid_npu.comm.all_to_all import fluid_all_to_all

    x = torch.arange(8.0).view(4, 2).requires_grad_()
    received = fluid_all_to_all(dist.group.WORLD, x, None, None)
    later = fluid_all_to_all(dist.group.WORLD, received * 2, None, None, async_op=True)
    out = later.wait()
    (out * torch.arange(8.0).view(4, 2)).sum().backward()
    return digests({"received": received.detach(), "out": out.detach(), "grad": x.grad})


def fused_gmm() -> dict[str, Any]:
    """``npu_gmm`` of a user, whose weight gradient goes into main_grad."""
    import torch

    from fluid_npu.ops.grouped_matmul import npu_gmm

    weight: Any = torch.nn.Parameter(torch.arange(12.0).view(2, 2, 3))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(2, 2, 3), False
    x = torch.arange(8.0).view(4, 2).requires_grad_()
    out = npu_gmm(x, weight, group_list=torch.tensor([1, 4]), gemm_fusion=True, original_weight=weight)
    out.sum().backward()
    found = digests({"out": out.detach(), "dx": x.grad, "main_grad": weight.main_grad})
    return {**found, "told": weight.grad_added_to_main_grad}


def left_over() -> dict[str, Any]:
    """Two tasks for which no flight comes: they run when backward() ends, the oldest first, or where too many wait."""
    found = {}
    for limit in (1, 8):
        found |= {f"{name} of {limit}": value for name, value in _two_tasks(limit).items()}
    return found


def _two_tasks(limit: int) -> dict[str, Any]:
    """Where at most so many may wait: what ran in which order, how many waited, and how many are left."""
    import torch

    from fluid_npu.device import device_of
    from fluid_npu.schedule.scheduler import BackwardScheduler
    from fluid_npu.schedule.task import DWTask

    scheduler, ran, waited = BackwardScheduler(queue_limit=limit), [], []

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            for name in ("older", "newer"):
                run = lambda name=name: ran.append(name)
                scheduler.submit(DWTask(name=name, run=run, shape=(1, 1, 1), device=device_of(dy)))
                waited.append(scheduler.pending)
            return dy * 2

    Linear.apply(torch.ones(2, requires_grad=True)).sum().backward()
    return {"ran": ran, "waited": waited, "left": scheduler.pending}


def digests(tensors: dict[str, Any]) -> dict[str, str]:
    """A few letters for the bits of each tensor."""
    found = {}
    for name, tensor in tensors.items():
        bits = b"none" if tensor is None else tensor.detach().contiguous().numpy().tobytes()
        found[name] = hashlib.sha256(bits).hexdigest()[:12]
    return found

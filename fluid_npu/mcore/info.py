"""What a model consists of and what its scheduler did, for people."""

from __future__ import annotations

from collections import Counter

import torch
from megatron.core.transformer.attention import Attention

from fluid_npu.mcore.linear import FluidLinear
from fluid_npu.mcore.moe_layer import FluidMoELayer
from fluid_npu.schedule.live import get_backward_scheduler

_RULE = "=" * 60


def print_fluid_layer_info(model: torch.nn.Module) -> None:
    """Prints a model's attention, MoE and linear layers by their module paths, and what its scheduler does."""
    modules = dict(model.named_modules())
    moe = [path for path, module in modules.items() if isinstance(module, FluidMoELayer)]
    linears = [path for path, module in modules.items() if isinstance(module, FluidLinear)]
    attention = [path for path, module in modules.items() if isinstance(module, Attention)]
    print(_RULE)
    print("FluidMoE Layer Information")
    print(_RULE)
    for title, paths in (("Attention layers", attention), ("MoE layers", moe), ("Linear layers", linears)):
        print(f"{title}: {len(paths)} {_classes(modules, paths)}".rstrip())
        for path in paths:
            print(f"  - {path or 'the model itself'}{_role(modules, path)}")
    print()
    scheduled = any(getattr(module, "backward_scheduler", None) is not None for module in modules.values())
    print(f"Scheduler status: {_status(model) if scheduled else 'none (no Fluid layer in this model)'}")
    print(_RULE)


def _classes(modules: dict[str, torch.nn.Module], paths: list[str]) -> str:
    """The classes of the modules at some paths: "FluidMoELayer", or several with their numbers."""
    counts = Counter(type(modules[path]).__name__ for path in paths)
    if len(counts) < 2:
        return "".join(counts)
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _role(modules: dict[str, torch.nn.Module], path: str) -> str:
    """Where the dW of a linear's layer runs; chunks of an MoE layer; the core of an attention layer, and how its ranks
    share a sequence."""
    module = modules[path]
    if isinstance(module, FluidMoELayer):
        in_chunks = [f"in {module.chunks.value} chunks of {module.chunks_of.value}"] if module.chunks.value > 1 else []
        told = ", ".join(in_chunks + ["local rows first"] * module.local_first.value)
        return f" ({told})" if told else ""
    if isinstance(module, FluidLinear):
        return f" (dW {module.dw_runs})"
    core = getattr(module, "core_attention", None)
    if not isinstance(core, torch.nn.Module):
        return ""
    context, chunks = getattr(core, "context", None), getattr(module, "head_chunks", None)
    shared = "" if context is None else f", {context.algorithm} over {context.ranks} ranks"
    return f" (core {type(core).__name__}{shared}{f' in {len(chunks.chunks)} chunks' if chunks is not None else ''})"


def _status(model: torch.nn.Module) -> str:
    try:
        scheduler = get_backward_scheduler(model)
    except LookupError as error:
        return str(error)
    carry = ", carry-over" if scheduler.carry_over else ""
    if scheduler.overlap == "off":
        return "Disabled (overlap off)"
    queue = f"{scheduler.pending} dW tasks queued, at most {scheduler.queue_limit} wait"
    return f"Enabled (overlap {scheduler.overlap}{carry}); {queue}"


def print_status(model: torch.nn.Module | None = None) -> None:
    """Prints the scheduler's counters since its last reset: dW tasks, AllToAll bytes and milliseconds."""
    scheduler = get_backward_scheduler(model)
    stats = scheduler.get_stats()
    print(f"{scheduler.name}: overlap {scheduler.overlap}, transport {scheduler.transport.name}")
    print(f"  dW tasks       {stats['completed_dw_tasks']:.0f} of {stats['total_dw_tasks']:.0f} done")
    print(
        f"  queue          {stats['queue_peak_tasks']:.0f} tasks at most, {stats['queue_peak_bytes'] / 2**20:.2f} MiB; "
        f"{stats['queue_full']:.0f} ran early (limit {scheduler.queue_limit})"
    )
    print(f"  AllToAlls      {stats['a2a_count']:.0f}, {stats['a2a_bytes'] / 2**20:.2f} MiB to other ranks")
    print(f"  in waits       {stats['exposed_ms']:.2f} ms")
    print(f"  waited at once {stats['a2a_ms']:.2f} ms (serialised exchanges only)")

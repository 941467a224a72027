"""What a model consists of and what its scheduler did, for people."""

from __future__ import annotations

import torch

from fluid_npu.mcore.moe_layer import FluidMoELayer
from fluid_npu.schedule.live import get_backward_scheduler

_RULE = "=" * 60


def print_fluid_layer_info(model: torch.nn.Module) -> None:
    """Prints the Fluid layers of a model by their module paths, and whether its scheduler overlaps anything."""
    paths = [name for name, module in model.named_modules() if isinstance(module, FluidMoELayer)]
    print(_RULE)
    print("FluidMoE Layer Information")
    print(_RULE)
    print(f"MoE layers: {len(paths)} FluidMoELayer")
    for path in paths:
        print(f"  - {path}")
    print()
    print(f"Scheduler status: {_status(model) if paths else 'none (no Fluid layer in this model)'}")
    print(_RULE)


def _status(model: torch.nn.Module) -> str:
    scheduler = get_backward_scheduler(model)
    carry = ", carry-over" if scheduler.carry_over else ""
    return "Disabled (overlap off)" if scheduler.overlap == "off" else f"Enabled (overlap {scheduler.overlap}{carry})"


def print_status(model: torch.nn.Module | None = None) -> None:
    """Prints the scheduler's counters since its last reset: dW tasks, AllToAll bytes and milliseconds."""
    scheduler = get_backward_scheduler(model)
    stats = scheduler.get_stats()
    print(f"{scheduler.name}: overlap {scheduler.overlap}, transport {scheduler.transport.name}")
    print(f"  dW tasks       {stats['completed_dw_tasks']:.0f} of {stats['total_dw_tasks']:.0f} done")
    print(f"  AllToAlls      {stats['a2a_count']:.0f}, {stats['a2a_bytes'] / 2**20:.2f} MiB to other ranks")
    print(f"  in waits       {stats['exposed_ms']:.2f} ms")
    print(f"  waited at once {stats['a2a_ms']:.2f} ms (serialised exchanges only)")

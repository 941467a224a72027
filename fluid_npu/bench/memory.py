"""Peak memory of one call, above what was alive before it.

On a CPU: the peak of live tensor bytes, from every allocation and release that torch's profiler records while the
call runs. gloo's threads may be the last to let go of a buffer, and what they release is not recorded: one call can
show too much, never too little, so the least of a few calls counts. On an accelerator: the allocator's own peak.

What a recorded layer computes lies in memory that it took when it was recorded, which no call allocates: it counts in
full, before and after each (``recordings_mb``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch

from fluid_npu.device import Device

_MIB = 2**20
_CALLS = 3


def peak_memory_mb(device: Device, call: Callable[[], Any]) -> float:
    """MiB of one call, which is made several times on a CPU. What it returns is freed within the measurement."""
    if device.name == "cpu":
        return min(peak_of(_allocations(call)) for _ in range(_CALLS)) / _MIB
    device.synchronize()
    module = getattr(torch, device.name)
    before = module.memory_allocated()
    device.reset_peak_memory()
    call()
    device.synchronize()
    return device.peak_memory_mb() - before / _MIB


def held_mb(device: Device, call: Callable[[], Any]) -> float:
    """MiB that are alive because of what the call returned, while that lives; without what lived before."""
    if device.name == "cpu":
        return min(sum(_allocations(call, keep=True)) for _ in range(_CALLS)) / _MIB
    device.synchronize()
    module = getattr(torch, device.name)
    before = module.memory_allocated()
    kept = call()
    device.synchronize()
    held = module.memory_allocated() - before
    del kept
    return float(held) / _MIB


def recordings_mb(model: torch.nn.Module) -> float:
    """MiB that the recordings of a model's layers keep for themselves; 0 where none is recorded."""
    graphed = (getattr(module, "graphed", None) for module in model.modules())
    return sum(layer.held_bytes for layer in graphed if layer is not None) / _MIB


def capacity_mb(device: Device) -> float:
    """MiB of the accelerator's memory; endless on a CPU, whose memory all ranks share."""
    if device.name == "cpu":
        return math.inf
    _, total = getattr(torch, device.name).mem_get_info()
    return float(total) / _MIB


def peak_of(changes: Iterable[int]) -> int:
    """The highest running sum of signed byte counts, at least 0."""
    return max(accumulate(changes, initial=0))


def _allocations(call: Callable[[], Any], *, keep: bool = False) -> list[int]:
    """Signed bytes of each allocation and release of the CPU allocator, in order of time.

    With ``keep`` what the call returns is released only afterwards.
    """
    from torch.profiler import ProfilerActivity, profile

    kept = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        result = call()
        kept = result if keep else None
        del result
    del kept
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events]

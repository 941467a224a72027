"""An NVIDIA GPU as a device: NCCL, CUDA events."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fluid_npu.device.base import AcceleratorDevice, AcceleratorEvent, TimingEvent


class CudaDevice(AcceleratorDevice):
    """The GPUs that torch sees."""

    name = "cuda"
    backend = "nccl"
    default_dtype = torch.bfloat16

    @property
    def _module(self) -> Any:
        return torch.cuda

    def event(self) -> TimingEvent:
        return AcceleratorEvent(_maker_of_events()())


@cache
def _maker_of_events() -> Callable[[], Any]:
    """torch.Event where it works: it finds the current stream in C++. torch.cuda.Event takes ten times as long."""
    try:
        start, end = (torch.Event(device="cuda", enable_timing=True) for _ in range(2))
        start.record()
        end.record()
        end.synchronize()
        start.elapsed_time(end)
    except Exception:  # an older torch has it without timing, or wants a stream
        return lambda: torch.cuda.Event(enable_timing=True)
    return lambda: torch.Event(device="cuda", enable_timing=True)

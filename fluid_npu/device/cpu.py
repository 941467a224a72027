"""The CPU as a device: gloo, the host clock, memory of the whole process."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable

import torch

from fluid_npu.device.base import Device, TimingEvent


class HostEvent:
    """A point of the host clock; CPU operators have ended when their call returns."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_ms(self, start_event: HostEvent) -> float:
        if self._seconds is None or start_event._seconds is None:
            raise RuntimeError("elapsed_ms: both events must be recorded first; call record() on each")
        return (self._seconds - start_event._seconds) * 1e3


class CpuDevice(Device):
    """The host processor."""

    name = "cpu"
    backend = "gloo"
    default_dtype = torch.float32

    def torch_device(self, local_rank: int = 0) -> torch.device:
        """Always ``cpu``: the ranks of one machine share it."""
        return torch.device("cpu")

    def set_current(self, local_rank: int = 0) -> None:
        """Nothing to select."""

    def synchronize(self) -> None:
        """Nothing to wait for: CPU operators are synchronous."""

    def aside(self, work: Callable[[], None]) -> Callable[[], None]:
        """At once: the host computes one thing after the other."""
        work()
        return lambda: None

    def event(self) -> TimingEvent:
        return HostEvent()

    def on_host(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def from_host(self, values: torch.Tensor, where: torch.device) -> torch.Tensor:
        """The tensor itself."""
        return values

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def peak_memory_mb(self) -> float:
        """Highest resident set of the whole process since it started, in MiB (``ru_maxrss``)."""
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    def reset_peak_memory(self) -> None:
        """Does nothing: the kernel offers no portable way to lower ``ru_maxrss``.

        The peak is that of the process's whole life; to compare two variants run each in a fresh process.
        """

    def describe(self) -> str:
        return f"{_processor_name()}, {_usable_cores()} cores usable"


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

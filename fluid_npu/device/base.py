"""What the rest of the package may ask of a device: where tensors live, clocks, seeds, memory.

A device knows nothing of MoE. The maths of a device is in ``device/kernels``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch


class DeviceUnavailable(RuntimeError):
    """The device that was asked for is not on this machine; the message says what is missing."""


class TimingEvent(Protocol):
    """A point in the device's order of work that can be timed."""

    def record(self) -> None:
        """Mark this point."""

    def elapsed_ms(self, start_event: Any) -> float:
        """Milliseconds from ``start_event`` to this event; waits until both have happened."""


class Device(ABC):
    """One kind of hardware. Instances hold no state of their own and may be shared."""

    name: str
    backend: str
    default_dtype: torch.dtype

    @abstractmethod
    def torch_device(self, local_rank: int = 0) -> torch.device:
        """The torch device of the process with this local rank."""

    @abstractmethod
    def set_current(self, local_rank: int = 0) -> None:
        """Make that device the current one of this process."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work that was launched has ended."""

    @abstractmethod
    def aside(self, work: Callable[[], None]) -> Callable[[], None]:
        """Starts ``work`` behind what was launched so far, beside what is launched next, which waits for it where the
        returned function is called. Until then tensors that ``work`` uses must live."""

    @abstractmethod
    def event(self) -> TimingEvent:
        """A new event that can be timed."""

    @abstractmethod
    def from_host(self, values: torch.Tensor, where: torch.device) -> torch.Tensor:
        """What ``values``, a CPU tensor, holds, on ``where``; the host does not wait for a copy."""

    @abstractmethod
    def manual_seed(self, seed: int) -> None:
        """Seed torch's generators of the CPU and of this device."""

    @abstractmethod
    def on_host(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of the host's ``values`` in memory of the host that work of this device may write to at any time."""

    @abstractmethod
    def get_rng_state(self) -> torch.Tensor:
        """State of this device's default generator, a uint8 tensor on the CPU."""

    @abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore what ``get_rng_state`` returned."""

    @abstractmethod
    def peak_memory_mb(self) -> float:
        """Highest memory use in MiB since the last reset (see the device for what is counted)."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new peak, where the device can."""

    @abstractmethod
    def describe(self) -> str:
        """Model and size of the hardware in one line."""

    def __str__(self) -> str:
        return self.name


class AcceleratorEvent:
    """A timing event of ``torch.cuda`` or ``torch.npu``: recorded on the current stream."""

    def __init__(self, event: Any):
        self._event = event

    def record(self) -> None:
        self._event.record()

    def elapsed_ms(self, start_event: AcceleratorEvent) -> float:
        self._event.synchronize()
        return float(start_event._event.elapsed_time(self._event))


class AcceleratorDevice(Device):
    """What CUDA and NPU share: ``_module`` is ``torch.cuda`` or ``torch.npu``, of the same shape."""

    def __init__(self) -> None:
        self._sides: dict[int, Any] = {}

    @property
    @abstractmethod
    def _module(self) -> Any: ...

    def torch_device(self, local_rank: int = 0) -> torch.device:
        return torch.device(self.name, local_rank)

    def set_current(self, local_rank: int = 0) -> None:
        self._module.set_device(local_rank)

    def synchronize(self) -> None:
        self._module.synchronize()

    def aside(self, work: Callable[[], None]) -> Callable[[], None]:
        """On a stream of its own, the same for all calls on a device."""
        module = self._module
        number = module.current_device()
        side = self._sides.get(number)
        if side is None:
            side = self._sides[number] = module.Stream()
        side.wait_stream(module.current_stream())
        with module.stream(side):
            work()
        return lambda: module.current_stream().wait_stream(side)

    def event(self) -> TimingEvent:
        return AcceleratorEvent(self._module.Event(enable_timing=True))

    def from_host(self, values: torch.Tensor, where: torch.device) -> torch.Tensor:
        """A copy through pinned memory, which torch's host allocator keeps until the copy has run."""
        return values.pin_memory().to(where, non_blocking=True)

    def on_host(self, values: torch.Tensor) -> torch.Tensor:
        return values.pin_memory()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        self._module.manual_seed(seed)

    def get_rng_state(self) -> torch.Tensor:
        return self._module.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self._module.set_rng_state(state)

    def peak_memory_mb(self) -> float:
        """Highest memory held by tensors of this process on its current device, in MiB."""
        return self._module.max_memory_allocated() / 2**20

    def reset_peak_memory(self) -> None:
        self._module.reset_peak_memory_stats()

    def describe(self) -> str:
        properties = self._module.get_device_properties(self._module.current_device())
        gib = properties.total_memory / 2**30
        return f"{properties.name}, {gib:.0f} GiB, {self._module.device_count()} visible"

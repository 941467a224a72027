"""The hardware seam: which device is here, and the kernels of the device that a tensor lives on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluid_npu.device.base import Device, DeviceUnavailable, TimingEvent
from fluid_npu.device.choice import Choice
from fluid_npu.device.cpu import CpuDevice
from fluid_npu.device.cuda import CudaDevice
from fluid_npu.device.npu import NpuDevice, probe_npu

if TYPE_CHECKING:
    from fluid_npu.device.kernels.base import Kernels

__all__ = [
    "Choice",
    "Device",
    "DeviceUnavailable",
    "TimingEvent",
    "device_of",
    "get_device",
    "kernels_of",
]

_DEVICES: dict[str, Device] = {"cpu": CpuDevice(), "cuda": CudaDevice(), "npu": NpuDevice()}
_kernels: dict[str, Kernels] = {}


def get_device(name: str = "auto") -> Choice[Device]:
    """The device called ``name`` ('auto', 'cpu', 'cuda' or 'npu') and why it was chosen.

    'auto' takes an NPU, else a GPU, else the CPU. Raises ValueError for another name and DeviceUnavailable
    for a device that is not here.
    """
    if name == "auto":
        return _choose_device()
    if name == "npu":
        present = probe_npu()
        fix = "install torch_npu and CANN (`pip install 'fluid-npu[npu]'`) or use --device cpu"
    elif name == "cuda":
        present = _probe_cuda()
        fix = "install a CUDA build of torch and a driver, or use --device cpu"
    elif name == "cpu":
        present, fix = Choice(True, ""), ""
    else:
        raise ValueError(f"--device {name!r}: allowed are auto, cpu, cuda, npu")
    if not present.value:
        raise DeviceUnavailable(f"--device {name}: {present.reason}; {fix}")
    return Choice(_DEVICES[name], f"--device {name}")


def _choose_device() -> Choice[Device]:
    npu, cuda = probe_npu(), _probe_cuda()
    if npu.value:
        return Choice(_DEVICES["npu"], npu.reason)
    if cuda.value:
        return Choice(_DEVICES["cuda"], cuda.reason)
    return Choice(_DEVICES["cpu"], f"{npu.reason}; {cuda.reason}")


def _probe_cuda() -> Choice[bool]:
    if torch.cuda.is_available():
        return Choice(True, f"torch sees {torch.cuda.device_count()} CUDA GPU(s)")
    if torch.version.cuda is None:
        return Choice(False, "this torch is built without CUDA")
    return Choice(False, "torch sees no CUDA GPU")


def device_of(tensor: torch.Tensor) -> Device:
    """The Device that ``tensor`` lives on; DeviceUnavailable for a type that has no implementation."""
    try:
        return _DEVICES[tensor.device.type]
    except KeyError:
        raise _no_implementation(tensor) from None


def kernels_of(tensor: torch.Tensor) -> Kernels:
    """The kernels of the device that ``tensor`` lives on."""
    kind = tensor.device.type
    found = _kernels.get(kind)
    return found if found is not None else _load_kernels(kind, tensor)


def _load_kernels(kind: str, tensor: torch.Tensor) -> Kernels:
    made: Kernels
    if kind == "cpu":
        from fluid_npu.device.kernels.cpu_kernels import CpuKernels

        made = CpuKernels()
    elif kind == "cuda":
        from fluid_npu.device.kernels.cuda_kernels import CudaKernels

        made = CudaKernels()
    elif kind == "npu":
        from fluid_npu.device.kernels.npu_kernels import NpuKernels

        made = NpuKernels()
    else:
        raise _no_implementation(tensor)
    return _kernels.setdefault(kind, made)


def _no_implementation(tensor: torch.Tensor) -> DeviceUnavailable:
    return DeviceUnavailable(
        f"tensor.device is {tensor.device}: there are kernels for cpu, cuda and npu; move the tensor there"
    )

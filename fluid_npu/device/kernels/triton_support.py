"""Whether Triton's kernels can be used here, and what the environment forces.

``FLUID_ROW_KERNELS``: permute, activations, RMSNorm and so on: ``auto`` (default), ``torch`` or ``triton``.
``FLUID_GROUPED_GEMM``: grouped matmuls: ``auto`` (default), ``rule`` (no measuring), ``triton``, or the name of a form.
``FLUID_GEMM_PROFILE``: a file of decisions, which replaces measuring (``GemmChooser.decisions``).
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

from fluid_npu.device.base import DeviceUnavailable
from fluid_npu.device.choice import Choice

ROW_KERNELS = "FLUID_ROW_KERNELS"
GROUPED_GEMM = "FLUID_GROUPED_GEMM"
GEMM_PROFILE = "FLUID_GEMM_PROFILE"
_OLDEST = (3, 2)  # what torch 2.6 brings


def setting(name: str, allowed: tuple[str, ...]) -> str:
    """The value of an environment variable, the first of ``allowed`` when unset. Raises ValueError for another."""
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    return value


@cache
def probe_triton() -> Choice[bool]:
    """Whether a Triton that our kernels were written for can be imported, and why not."""
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.language")
    except Exception as error:  # a Triton that does not fit its torch or its driver raises whatever it likes
        return Choice(False, f"triton cannot be imported ({type(error).__name__}: {error}); pip install triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        return Choice(False, f"triton {triton.__version__} is older than {_OLDEST[0]}.{_OLDEST[1]}")
    return Choice(True, f"triton {triton.__version__}")


def triton_on(device: torch.device) -> Choice[bool]:
    """``probe_triton``, and whether this device can run its kernels: a GPU from Ampere on, or the interpreter."""
    found = probe_triton()
    if not found.value or device.type != "cuda":
        return found
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return Choice(False, f"the GPU has compute capability {major}.{minor}; the kernels want 8.0 or later")
    return found


def load(name: str) -> ModuleType:
    """One of our Triton modules, such as ``triton_permute``. Raises DeviceUnavailable without Triton."""
    found = probe_triton()
    if not found.value:
        raise DeviceUnavailable(f"fluid_npu's {name} kernels: {found.reason}")
    return importlib.import_module(f"fluid_npu.device.kernels.{name}")

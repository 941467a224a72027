"""An Ascend NPU as a device: HCCL, NPU events. torch_npu is imported only when an NPU is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from typing import Any

import torch

from fluid_npu.device.base import AcceleratorDevice, DeviceUnavailable
from fluid_npu.device.choice import Choice


class NpuDevice(AcceleratorDevice):
    """The NPUs that torch_npu sees."""

    name = "npu"
    backend = "hccl"
    default_dtype = torch.bfloat16

    @property
    def _module(self) -> Any:
        return load_torch_npu().npu


def load_torch_npu() -> Any:
    """The torch_npu module; DeviceUnavailable names what is missing."""
    try:
        return importlib.import_module("torch_npu")
    except Exception as error:  # a CANN that is not set up raises many kinds
        raise DeviceUnavailable(
            f"--device npu: torch_npu cannot be imported ({type(error).__name__}: {error}); install it with "
            "`pip install 'fluid-npu[npu]'` and source CANN's set_env.sh, or use --device cpu"
        ) from error


def cuda_names_mean_the_npu() -> None:
    """Lets code that says ``torch.cuda`` or 'cuda', as Megatron does throughout, run on the NPU.

    That is torch_npu's own ``contrib.transfer_to_npu``, which MindSpeed's users import too. It is process-wide and has
    no way back; it also turns ``torch.jit.script`` off. torch 2.13 then asks for a CUDA capability in every broadcast,
    which torch_npu 2.13 answers with None unless TORCH_NPU_DEVICE_CAPABILITY says one; 8.0 is set where it is unset.
    """
    os.environ.setdefault("TORCH_NPU_DEVICE_CAPABILITY", "8.0")
    warnings.filterwarnings("ignore", message="The return value of get_device_capability is only for compatibility")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lists what it replaces
        importlib.import_module("torch_npu.contrib.transfer_to_npu")


def probe_npu() -> Choice[bool]:
    """Whether an NPU can be used here, and why; imports torch_npu only if it is installed."""
    if importlib.util.find_spec("torch_npu") is None:
        return Choice(False, "torch_npu is not installed")
    try:
        npu = load_torch_npu().npu
    except DeviceUnavailable as error:
        return Choice(False, f"torch_npu is installed but cannot be imported: {error.__cause__}")
    if not npu.is_available():
        return Choice(False, "torch_npu is installed but torch.npu.is_available() is False")
    return Choice(True, f"torch_npu sees {npu.device_count()} NPU(s)")

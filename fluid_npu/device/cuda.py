"""An NVIDIA GPU as a device: NCCL, CUDA events."""

from __future__ import annotations

from typing import Any

import torch

from fluid_npu.device.base import AcceleratorDevice


class CudaDevice(AcceleratorDevice):
    """The GPUs that torch sees."""

    name = "cuda"
    backend = "nccl"
    default_dtype = torch.bfloat16

    @property
    def _module(self) -> Any:
        return torch.cuda

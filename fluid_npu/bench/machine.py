"""What a result was measured on: device, cores, load, and the settings of queues and transports."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from fluid_npu.train.launch import usable_cores
from fluid_npu.train.parallel import Place
from fluid_npu.train.summary import versions

_SETTINGS = ("NCCL_", "HCCL_", "GLOO_", "CUDA_DEVICE_MAX_CONNECTIONS", "TASK_QUEUE_ENABLE", "OMP_NUM_THREADS")


def describe_machine(place: Place) -> dict[str, Any]:
    """For the ``machine`` entry of a result. ``load_average``: of the last minute, high means disturbed figures."""
    return {
        "device": place.device.name,
        "description": place.device.describe(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": usable_cores(),
        "nproc": place.world,
        "threads_per_rank": torch.get_num_threads(),
        "backend": place.device.backend,
        "settings": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_SETTINGS)},
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def describe_versions() -> dict[str, str]:
    """For the ``versions`` entry."""
    return {**versions(), "numpy": __import__("numpy").__version__}

"""Which device the tests run on: ``pytest --device npu`` for an NPU, real or simulated, else the CPU.

The option travels in the environment, so that processes of ``run_ranks`` know it too. References stay on the host:
a test builds its numbers there, moves them with ``here`` and compares what ``host`` brings back.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch

VARIABLE = "FLUID_TEST_DEVICE"
NAMES = ("cpu", "npu")
NAME = os.environ.get(VARIABLE, "cpu")

#: Modules that ``run_ranks`` imports once for all of its processes: 5 s each time otherwise.
PRELOAD = ["torch_npu"] if NAME == "npu" else []

Movable = TypeVar("Movable", torch.Tensor, torch.nn.Module)


def device() -> Any:
    """fluid_npu's device of this test run."""
    from fluid_npu.device import get_device

    return get_device(NAME).value


def adapt() -> None:
    """What Megatron needs on this device."""
    import fluid_npu
    from fluid_npu.probes import installed

    fluid_npu.adapt([NAME] if NAME != "cuda" else [] if installed("transformer_engine").value else ["no_te"])


def torch_device() -> torch.device:
    """Where this process puts its tensors: a rank's own NPU."""
    return device().torch_device(int(os.environ.get("LOCAL_RANK", "0")))


def can_fuse() -> bool:
    """Whether Megatron's linears can add dW to main_grad: with Apex, or with the stand-in that ``adapt`` brings."""
    from megatron.core.tensor_parallel import layers

    return bool(layers._grad_accum_fusion_available)


def here(value: Movable) -> Movable:
    """The tensor or module on this test run's device; a tensor that asks for a gradient is a leaf there."""
    moved = value.to(torch_device())
    if isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf and moved is not value:
        return moved.detach().requires_grad_()
    return moved


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Its values in float64 on the host, for a reference."""
    return tensor.detach().cpu().double()


def agree(got: torch.Tensor, stock: torch.Tensor) -> bool:
    """The same bits on a CPU; on an NPU, whose fused operators round less often than stock's chain, within rounding."""
    if NAME == "cpu":
        return torch.equal(got, stock)
    from fluid_npu.ops.reference import relative_error

    return got.dtype == stock.dtype and relative_error(got, stock) <= 2 * torch.finfo(got.dtype).eps


def host(value: Any) -> Any:
    """The same with every tensor on the CPU, inside lists, tuples and dictionaries too."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu() if value.device.type != "cpu" else value
    if isinstance(value, dict):
        return {key: host(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(host(entry) for entry in value)
    return value

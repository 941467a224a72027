"""NCCL on a stream of high priority, in a communicator of its own.

An AllToAll of NCCL is a kernel. Launched beside a product that fills the GPU, it waits until the last of the product's
programs have begun; on a stream of high priority it is next as soon as any of them ends. The stream of a process group
that exists already cannot be changed. Where every program of a product lasts as long as the product, priority is no
help: ``device/kernels/beside.py`` is about those.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fluid_npu.comm.transports.own_groups import OwnGroupsTransport


def high_priority_transport() -> OwnGroupsTransport:
    """The collective, ahead of what computes."""

    def options() -> Any:
        return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)

    return OwnGroupsTransport("high-priority", "nccl", options, 1, "a communicator on a stream of high priority")


def high_priority_missing(device: str) -> str:
    """What keeps this device from it; empty when nothing."""
    if device != "cuda":
        return f"streams of high priority are NCCL's here, and this device is {device}"
    return "" if dist.is_nccl_available() else "this torch has no NCCL"

"""NCCL on a stream of high priority, in a communicator of its own.

An AllToAll of NCCL is a kernel. Launched beside a product that fills the GPU, it waits until the last of the product's
programs have begun; on a stream of high priority it is next as soon as any of them ends. The stream of a process group
that exists already cannot be changed. Where every program of a product lasts as long as the product, priority is no
help: ``device/kernels/beside.py`` is about those.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fluid_npu.comm.transports.few_ctas import ctas_config_missing
from fluid_npu.comm.transports.own_groups import OwnGroupsTransport


def high_priority_transport(ctas: int = 0) -> OwnGroupsTransport:
    """The collective, ahead of what computes. ``ctas``: how many NCCL has for an exchange; 0 leaves it to NCCL."""
    if ctas < 0:
        raise ValueError(f"ctas={ctas}: must not be negative; give 0 to leave it to NCCL")

    def options() -> Any:
        made = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if ctas:
            made.config.min_ctas = made.config.max_ctas = ctas
        return made

    reason = "a communicator on a stream of high priority"
    if ctas:
        reason += f", with {ctas} CTA{'s' if ctas > 1 else ''}"
    return OwnGroupsTransport("high-priority", "nccl", options, 1, reason)


def high_priority_missing(device: str, ctas: int = 0) -> str:
    """What keeps this device from it, with so many CTAs; empty when nothing."""
    if device != "cuda":
        return f"streams of high priority are NCCL's here, and this device is {device}"
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    missing = ctas_config_missing() if ctas else ""
    return f"{missing}, which --a2a-ctas {ctas} needs (leave it out)" if missing else ""

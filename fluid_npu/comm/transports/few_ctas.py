"""NCCL on few CTAs: each group gets a communicator of its own with at most ``ctas`` of them, on a high-priority stream.

An AllToAll of NCCL is a kernel. Beside a GEMM that holds every multiprocessor it waits for the GEMM's end; with few
CTAs and a GEMM that leaves as many multiprocessors free (``carve_out``) both run; the AllToAll alone is slower then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.own_groups import OwnGroupsTransport

DEFAULT_CTAS = 8


def few_ctas_transport(ctas: int = DEFAULT_CTAS) -> OwnGroupsTransport:
    """``ctas``: how many NCCL may use for an exchange."""
    if ctas < 1:
        raise ValueError(f"ctas={ctas}: NCCL needs one CTA at least; give 4 to 16")

    def options() -> Any:
        made = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        made.config.max_ctas, made.config.min_ctas = ctas, 1
        return made

    return OwnGroupsTransport("few-ctas", "nccl", options, 1, f"at most {ctas} CTA{'s' if ctas > 1 else ''}")


def few_ctas_missing(device: str) -> str:
    """What a communicator with few CTAs lacks here; empty when nothing."""
    if device != "cuda":
        return f"CTAs are NCCL's, and this device is {device}"
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    return ctas_config_missing()


def ctas_config_missing() -> str:
    """What a torch with NCCL lacks to say a number of CTAs; empty when nothing."""
    if not hasattr(dist.ProcessGroupNCCL.Options(), "config"):
        return f"torch {torch.__version__} has no ProcessGroupNCCL.Options().config"
    return ""


@contextmanager
def carve_out(multiprocessors: int) -> Iterator[None]:
    """Matrix products launched inside leave that many multiprocessors free, where torch can; 0 changes nothing."""
    carve = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if not multiprocessors or carve is None:
        yield
        return
    before = torch._C._get_sm_carveout_experimental()
    carve(multiprocessors)
    try:
        yield
    finally:
        carve(before)

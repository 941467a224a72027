"""HCCL's collective scheduled by the AI CPU and carried by SDMA, which leaves the AI cores to compute.

HCCL can also expand a collective into a kernel of the vector cores (AIV), which competes with what runs beside it; some
CANN releases choose that by themselves. HCCL runs the collectives of one communicator one after the other, so each
group gets two. Each communicator holds two buffers of ``buffer_mib`` MiB (HCCL's default is 200), and a message larger
than the buffer is sent in parts.
"""

from __future__ import annotations

from typing import Any

from fluid_npu.comm.transports.own_groups import OwnGroupsTransport
from fluid_npu.device.npu import load_torch_npu

_AI_CPU = 2  # HcclCommConfig.hcclOpExpansionMode: 0 default, 1 host, 2 AI CPU, 3 AIV
_TWINS = 2
DEFAULT_MIB = 200


def hccl_aicpu_transport(buffer_mib: int = DEFAULT_MIB) -> OwnGroupsTransport:
    """``buffer_mib``: room for all that a rank sends or receives in one exchange."""
    if buffer_mib < 1:
        raise ValueError(f"buffer_mib={buffer_mib}: HCCL needs 1 MiB at least; its default is {DEFAULT_MIB}")

    def options() -> Any:
        made = load_torch_npu()._C._distributed_c10d.ProcessGroupHCCL.Options()
        made.hccl_config = {"hccl_op_expansion_mode": _AI_CPU, "hccl_buffer_size": buffer_mib}
        return made

    reason = f"HCCL by AI CPU, {_TWINS} communicators a group with buffers of {buffer_mib} MiB"
    return OwnGroupsTransport("aicpu", "hccl", options, _TWINS, reason)


def hccl_aicpu_missing(device: str) -> str:
    """What it lacks here; empty when nothing."""
    return "" if device == "npu" else f"the AI CPU is an NPU's, and this device is {device}"

"""A peer-copy transport for the device of this job."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fluid_npu.comm.transports.peer_copy import PeerCopyTransport
from fluid_npu.comm.transports.peer_cuda import open_cuda_memory
from fluid_npu.comm.transports.peer_host import open_host_memory
from fluid_npu.comm.transports.peer_memory import PeerMemory, WindowSize
from fluid_npu.device.choice import Choice

#: Bytes of one rank's window, over all peers.
WINDOW_BYTES = 64 << 20
SLOTS = 4
_ALIGNED = 4096


def window_size(world: int, window_bytes: int = WINDOW_BYTES, slots: int = SLOTS) -> WindowSize:
    """The slots of a window of about that many bytes for a group of ``world`` ranks."""
    slot = window_bytes // (slots * max(world - 1, 1)) // _ALIGNED * _ALIGNED
    return WindowSize(slots=slots, slot_bytes=max(slot, _ALIGNED))


def peer_copy_transport(
    device: str, *, window_bytes: int = WINDOW_BYTES, slots: int = SLOTS, timeout_s: float = 1800.0
) -> PeerCopyTransport:
    """For groups whose ranks are on one node.

    Args:
        device: "cpu", "cuda" or "npu"; on an NPU no group gets windows.
        window_bytes: memory that each rank gives to each group.
        slots: into how many pieces that can be under way a window is cut for each peer.
        timeout_s: how long a peer is waited for.
    """
    if slots < 2:
        raise ValueError(f"slots={slots}: with less than 2 a sender always waits for the receiver; give 2 or more")

    def open_memory(group: Any) -> Choice[PeerMemory | None]:
        size = window_size(dist.get_world_size(group), window_bytes, slots)
        if device == "cuda":
            return open_cuda_memory(group, size)
        if device == "cpu":
            return open_host_memory(group, size)
        return Choice(None, f"there are no windows between devices of kind {device}")

    return PeerCopyTransport(open_memory, timeout_s=timeout_s)

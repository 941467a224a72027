"""A peer-copy transport for the device of this job."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fluid_npu.comm.transports.peer_copy import PeerCopyTransport
from fluid_npu.comm.transports.peer_cuda import open_cuda_memory
from fluid_npu.comm.transports.peer_host import open_host_memory
from fluid_npu.comm.transports.peer_memory import PeerMemory, WindowSize
from fluid_npu.device.choice import Choice

#: Bytes of one rank's rings, over all peers.
RING_BYTES = 16 << 20
SLOTS = 4
#: Of one landing area.
LANDING_BYTES = 80 << 20
_ALIGNED = 4096


def window_size(
    world: int, ring_bytes: int = RING_BYTES, slots: int = SLOTS, landing_bytes: int = LANDING_BYTES
) -> WindowSize:
    """A window of about that many bytes for a group of ``world`` ranks."""
    slot = ring_bytes // (slots * max(world - 1, 1)) // _ALIGNED * _ALIGNED
    area = -(-landing_bytes // _ALIGNED) * _ALIGNED
    return WindowSize(world=world, slots=slots, slot_bytes=max(slot, _ALIGNED), landing_bytes=area)


def peer_copy_transport(
    device: str,
    *,
    ring_bytes: int = RING_BYTES,
    slots: int = SLOTS,
    landing_bytes: int = LANDING_BYTES,
    timeout_s: float = 1800.0,
) -> PeerCopyTransport:
    """For groups whose ranks are on one node.

    Args:
        device: "cpu", "cuda" or "npu"; on an NPU no group gets windows.
        ring_bytes: memory that each rank gives to each group for exchanges that go in pieces.
        slots: pieces of a peer that can be in the ring.
        landing_bytes: memory for all that a rank receives in one exchange; each group has two such areas. An exchange
            that gives some rank more goes through the ring. 0: all of them do.
        timeout_s: how long a peer is waited for.
    """
    if slots < 2:
        raise ValueError(f"slots={slots}: with less than 2 a sender always waits for the receiver; give 2 or more")

    def open_memory(group: Any) -> Choice[PeerMemory | None]:
        size = window_size(dist.get_world_size(group), ring_bytes, slots, landing_bytes)
        if device == "cuda":
            return open_cuda_memory(group, size)
        if device == "cpu":
            return open_host_memory(group, size)
        return Choice(None, f"there are no windows between devices of kind {device}")

    return PeerCopyTransport(open_memory, timeout_s=timeout_s)

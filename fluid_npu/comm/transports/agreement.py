"""What the ranks of a group tell each other before they decide: the same list everywhere."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fluid_npu.comm.guard import collective


def gathered(value: Any, group: Any) -> list[Any]:
    """Each rank's value, in rank order; a collective call."""
    found: list[Any] = [None] * dist.get_world_size(group)
    with collective("agreement on a transport", tuple(dist.get_process_group_ranks(group))):
        dist.all_gather_object(found, value, group=group)
    return found


def node_name() -> str:
    """The same for ranks that run on one node, and only for those."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"

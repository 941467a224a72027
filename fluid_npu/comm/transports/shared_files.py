"""Memory that the processes of one node share: a file without a name for each rank, and a sign that its owner lives.

The file is in /dev/shm and is unlinked as soon as every rank has mapped it, so nothing is left behind by a job that
dies. Each rank holds a lock on its own file; the kernel takes it away with the process.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.agreement import gathered, node_name
from fluid_npu.device.choice import Choice

_FOLDER = "/dev/shm"


class SharedFile:
    """One rank's memory, seen by any rank."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, size)
        self.bytes: torch.Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def owner_lives(self) -> bool:
        """For a file of another rank: whether that process still exists."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """Lets the memory go when no tensor refers to it any more."""
        del self.bytes
        os.close(self._descriptor)


def share(group: Any, size: int) -> Choice[list[SharedFile] | None]:
    """``size`` zero bytes of each rank, in rank order; a collective call, with the same answer on all ranks."""
    if len(set(gathered(node_name(), group))) > 1:
        return Choice(None, "the ranks are on several nodes")
    own, path, error = -1, "", ""
    try:
        own, path = tempfile.mkstemp(prefix="fluid-npu-", dir=_FOLDER)
        os.posix_fallocate(own, 0, size)
        fcntl.lockf(own, fcntl.LOCK_EX)
    except OSError as failure:
        error = f"{size >> 20} MiB in {_FOLDER}: {failure.strerror}"
    told = gathered((path, error), group)
    files: list[SharedFile] = []
    if not any(error for _, error in told):
        files, error = _map([path for path, _ in told], own, size, dist.get_rank(group))
    errors = [text for text in (*(error for _, error in told), *gathered(error, group)) if text]
    if path:
        os.unlink(path)
    return Choice(None, errors[0]) if errors else Choice(files, f"shared memory, {size >> 20} MiB a rank")


def _map(paths: list[str], own: int, size: int, index: int) -> tuple[list[SharedFile], str]:
    # Closing any descriptor of a file drops the lock that this process has on it: the own file is not opened twice.
    try:
        handles = [own if rank == index else os.open(path, os.O_RDWR) for rank, path in enumerate(paths)]
        return [SharedFile(handle, size) for handle in handles], ""
    except OSError as failure:
        return [], f"{_FOLDER}: {failure.strerror}"

"""Recorded work: what a device was told once is told again by one call of the host.

A recorder runs a body while the device takes notes instead of working. The body's results are tensors at fixed
addresses; each replay does all of its work again, from what lies at the addresses it read. Recordings of one recorder
share memory: they must be replayed in the order in which they were made.

NCCL does not end a communicator while a graph lives that has recorded one of its calls (``ncclCommDestroy`` waits for
it), so ``torch.distributed.destroy_process_group()`` would never return. All recordings are therefore given back before
the process groups end: by ``release_recordings``, which is called for the caller once there is something to release.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from fluid_npu.device.choice import Choice

T = TypeVar("T")


class GraphRecorder(Protocol):
    """Records bodies."""

    def record(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(what replays the body, its results). The body's own work is not done before the first replay."""

    def held_bytes(self) -> int:
        """Of the memory that the recordings share; no tensor of anybody else can be there."""


class Recording(Protocol):
    """What one body was recorded as."""

    def reset(self) -> None:
        """Gives it back; it cannot be replayed any more."""


_living: weakref.WeakSet[Recording] = weakref.WeakSet()


def release_recordings() -> None:
    """Gives all recordings of this process back; replaying one raises RuntimeError from then on."""
    for recording in list(_living):
        recording.reset()
    _living.clear()


def release_at_the_end(recording: Recording) -> None:
    """The recording is given back before all process groups end, and before the process does."""
    _living.add(recording)
    destroy = dist.destroy_process_group
    if hasattr(destroy, "releases_recordings"):
        return

    @functools.wraps(destroy)
    def release_and_destroy(group: Any = None) -> None:
        if group in (None, dist.GroupMember.WORLD):
            release_recordings()
        destroy(group)

    release_and_destroy.releases_recordings = True  # type: ignore[attr-defined]
    dist.destroy_process_group = release_and_destroy
    atexit.register(release_recordings)


class CudaGraphRecorder:
    """CUDA graphs in one private memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks for events meanwhile, and the backward runs on threads of autograd.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = body()
        release_at_the_end(graph)
        return graph.replay, made

    def held_bytes(self) -> int:
        return bytes_of_pool(torch.cuda.memory_snapshot(), self._pool)


def bytes_of_pool(segments: Iterable[Mapping[str, Any]], pool: tuple[int, int]) -> int:
    """What torch's allocator took from the device for a pool, used or not: the ``segments`` of a memory snapshot."""
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))


def graph_recorder(device: torch.device) -> Choice[Callable[[], GraphRecorder] | None]:
    """What makes a recorder for work on ``device``, and why there is none."""
    if device.type != "cuda":
        return Choice(None, f"only CUDA graphs are supported, and the layer is on {device.type}")
    return Choice(CudaGraphRecorder, "CUDA graphs")

"""Recorded work: what a device was told once is told again by one call of the host.

A recorder runs a body while the device takes notes instead of working. The body's results are tensors at fixed
addresses; each replay does all of its work again, from what lies at the addresses it read. Recordings of one recorder
share memory: they must be replayed in the order in which they were made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from fluid_npu.device.choice import Choice

T = TypeVar("T")


class GraphRecorder(Protocol):
    """Records bodies."""

    def record(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """(what replays the body, its results). The body's own work is not done before the first replay."""


class CudaGraphRecorder:
    """CUDA graphs in one private memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks for events meanwhile, and the backward runs on threads of autograd.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = body()
        return graph.replay, made


def graph_recorder(device: torch.device) -> Choice[Callable[[], GraphRecorder] | None]:
    """What makes a recorder for work on ``device``, and why there is none."""
    if device.type != "cuda":
        return Choice(None, f"only CUDA graphs are supported, and the layer is on {device.type}")
    return Choice(CudaGraphRecorder, "CUDA graphs")

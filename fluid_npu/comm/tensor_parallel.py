"""The collectives of a tensor-parallel linear layer as handles: its input gathered, its input gradient reduced.

What the caller computes between ``gather`` or ``reduce`` and ``land`` runs beside the collective. In the serialised
twin each is waited for at once. S rows of this rank (sequence times batch, split over P ranks under sequence
parallelism), K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.all_to_all import Peers
from fluid_npu.comm.guard import collective
from fluid_npu.comm.sink import OverlapSink


class TensorFlight:
    """One collective under way. Keeps both buffers alive until it has landed."""

    def __init__(self, name: str, region: TensorRegion, output: torch.Tensor, start: Callable[[], Any]) -> None:
        self._name, self._region, self._output = name, region, output
        self._start: Any = start  # holds the source
        region.sink.recorder.add("launch", name)
        with collective(name, region.peers.ranks):
            self._work = start()
        if region.sink.serialised or torch.is_anomaly_enabled():
            self.land()

    def land(self) -> torch.Tensor:
        """The result, once it is there; a second call does not wait again."""
        if self._work is not None:
            with collective(self._name, self._region.peers.ranks):
                self._work.wait()
            self._work = self._start = None
            self._region.sink.recorder.add("wait", self._name)
        return self._output


@dataclass(frozen=True, kw_only=True)
class TensorRegion:
    """A column-parallel linear's tensor ranks.

    ``gathers``: sequence parallelism, the input is gathered along its first dimension and the gradient scattered;
    else every rank has the whole input and the gradients are summed. ``sink`` says whether to wait at once.
    """

    peers: Peers
    gathers: bool
    sink: OverlapSink
    label: str = ""

    @property
    def name(self) -> str:
        """Of the collective that reduces the input gradient: "reduce-scatter of dX of layer 3"."""
        return f"{'reduce-scatter' if self.gathers else 'all-reduce'} of dX{f' of {self.label}' if self.label else ''}"

    def gather(self, x: torch.Tensor) -> TensorFlight:
        """Starts the all-gather of ``[S, ..., K]`` into ``[S * P, ..., K]``."""
        x = x.contiguous()
        whole = x.new_empty((x.shape[0] * len(self.peers.ranks), *x.shape[1:]))
        start = lambda: dist.all_gather_into_tensor(whole, x, group=self.peers.group, async_op=True)
        return TensorFlight(f"all-gather of x{f' of {self.label}' if self.label else ''}", self, whole, start)

    def reduce(self, dx: torch.Tensor) -> TensorFlight:
        """Starts the sum over the ranks: of all of ``dx``, in place, or of this rank's rows of ``[S * P, ..., K]``."""
        dx = dx.contiguous()
        if not self.gathers:
            return TensorFlight(self.name, self, dx, lambda: dist.all_reduce(dx, group=self.peers.group, async_op=True))
        mine = dx.new_empty((dx.shape[0] // len(self.peers.ranks), *dx.shape[1:]))
        start = lambda: dist.reduce_scatter_tensor(mine, dx, group=self.peers.group, async_op=True)
        return TensorFlight(self.name, self, mine, start)

"""What an AllToAll asks of its surroundings: injected, because comm/ knows no scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fluid_npu.comm.stats import CommStats
from fluid_npu.comm.transports import CollectiveTransport, Transport
from fluid_npu.device.recorder import Recorder


class OverlapSink(Protocol):
    """The engine behind an exchange."""

    @property
    def serialised(self) -> bool:
        """Whether each exchange is waited for at once."""

    transport: Transport
    comm: CommStats
    recorder: Recorder

    def fill(self, comm_type: str, name: str) -> None:
        """Runs the queued work that may run while the reverse of the exchange ``name`` is in flight."""


@dataclass
class DirectSink:
    """No engine: nothing is queued, so nothing fills a flight."""

    serialised: bool = False
    transport: Transport = field(default_factory=CollectiveTransport)
    comm: CommStats = field(default_factory=CommStats)
    recorder: Recorder = field(default_factory=Recorder)

    def fill(self, comm_type: str, name: str) -> None:
        """Nothing to run."""


@dataclass(frozen=True)
class Passengers:
    """Weights whose gradients the backward of a launch delivers, after the flight was filled.

    ``collect()`` returns one gradient, or None, per weight. The weights become inputs of the launch's autograd
    node, so a hook on their AccumulateGrad node (Megatron's and torch's DDP) fires only after their dW ran.
    """

    weights: Sequence[torch.Tensor]
    collect: Callable[[], tuple[torch.Tensor | None, ...]]

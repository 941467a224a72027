"""A transport that keeps to its contract and no more: sources must live until ``wait()``, rows arrive at ``wait()``.

Backends keep buffers alive and deliver early, and so hide an engine's faults. This one holds no buffer of the engine,
fills the received rows with NaN until ``wait()``, and tells the recorder the span that the contract allows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.order.recorder import OrderRecorder


class _Promised:
    def __init__(self, recorder: OrderRecorder, number: int, output: torch.Tensor, inbox: torch.Tensor, work: Any):
        self._recorder, self._number = recorder, number
        self._output, self._device = weakref.ref(output), output.device
        self._inbox, self._work = inbox, work

    def wait(self) -> None:
        with self._recorder.paused():
            self._work.wait()
            output = self._output()
            if output is not None:
                output.copy_(self._inbox)
        self._recorder.land(self._number, self._device)


class PromiseTransport:
    """AllToAll over private buffers; see the module."""

    name = "promise"

    def __init__(self, recorder: OrderRecorder) -> None:
        self._recorder = recorder

    def start(self, output: torch.Tensor, source: torch.Tensor, taken: Any, given: Any, group: Any) -> _Promised:
        """Starts the exchange of a copy of ``source``."""
        number = self._recorder.launch("alltoall", group, [source], [output])
        with self._recorder.paused():
            inbox = torch.empty_like(output)
            if output.is_floating_point():
                output.fill_(float("nan"))
            work = dist.all_to_all_single(inbox, source.clone(), taken, given, group=group, async_op=True)
        return _Promised(self._recorder, number, output, inbox, work)

"""Runs weight gradients while an AllToAll is in flight.

    combine-backward AllToAll    ||  dW that the layer above left over (only with carry_over)
    dX of FC2, activation, dX of FC1: each hands its dW here
    dispatch-backward AllToAll   ||  dW of FC2, dW of FC1

Which task runs in which flight follows from configuration and the graph alone, so every rank takes the same order,
whatever its load or clock. One scheduler serves one model; it is found through the model's layers and holds no
state outside itself. Backward runs on other threads than forward, so nothing here is thread-local.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fluid_npu.comm.stats import CommStats
from fluid_npu.comm.transports import CollectiveTransport, Transport
from fluid_npu.device.base import TimingEvent
from fluid_npu.device.recorder import Recorder
from fluid_npu.schedule.task import DWTask

_FOLD_AT = 2048

#: What ``overlap`` may be. 'full' (pipelined forward) is not built yet.
OVERLAP_MODES = ("off", "dw")


class BackwardScheduler:
    """The queue of one model's dW tasks, and the sink of its AllToAlls.

    Args:
        overlap: 'off' runs each dW at once and waits for each AllToAll at once; 'dw' overlaps the two.
        carry_over: lets FC2's dW wait for the combine of the layer below. Needs a DDP that takes gradients
            late (``DistributedDataParallelConfig.delay_wgrad_compute``); without one it has no effect.
        transport: moves the bytes; None takes the collective of torch.distributed.
        name: how messages call this scheduler's model.

    Raises:
        ValueError: an overlap mode that does not exist or is not built.
    """

    def __init__(
        self,
        overlap: str = "dw",
        *,
        carry_over: bool = False,
        transport: Transport | None = None,
        name: str = "unnamed model",
    ) -> None:
        if overlap not in OVERLAP_MODES:
            raise ValueError(f"overlap={overlap!r}: allowed are {', '.join(OVERLAP_MODES)} ('full' is not built yet)")
        self.overlap = overlap
        self.carry_over = carry_over and overlap != "off"
        self.transport: Transport = transport if transport is not None else CollectiveTransport()
        self.name = name
        #: Numbers of the lowest layer of each pipeline chunk on this rank: below it there is no combine to wait for.
        self.lowest_layers: frozenset[int] = frozenset()
        self.comm = CommStats()
        self.recorder = Recorder()
        self._twin = False
        self._queue: deque[DWTask] = deque()
        self.reset_stats()

    @property
    def serialised(self) -> bool:
        """Whether each AllToAll is waited for at once."""
        return self._twin or self.overlap == "off"

    @contextmanager
    def serialise(self) -> Iterator[None]:
        """Runs the body as the serialised twin: same kernels, buffers and order, no flight is filled."""
        before, self._twin = self._twin, True
        try:
            yield
        finally:
            self._twin = before

    @property
    def pending(self) -> int:
        """Tasks queued and not yet run."""
        return len(self._queue)

    def submit(self, task: DWTask) -> None:
        """Takes a task from an operator's backward. With overlap off it runs here and now."""
        self._total += 1
        self._flops += task.flops
        if self.overlap == "off":
            self._run(task, "at once")
            return
        if not self._queue:
            # Nothing may be left when backward() returns, whatever part of the graph ran.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        self._queue.append(task)

    def fill(self, comm_type: str, name: str) -> None:
        """Runs what may run beside the backward of this exchange, oldest first.

        The combine takes everything; the dispatch leaves tasks marked ``carry`` for the combine below.
        """
        kept: deque[DWTask] = deque()
        while self._queue:
            task = self._queue.popleft()
            if task.carry and comm_type == "moe_dispatch":
                kept.append(task)
            else:
                self._run(task, f"backward of {name}")
        self._queue = kept

    def _run(self, task: DWTask, region: str) -> None:
        self.recorder.add("dw", task.name, region=region)
        start, end = task.device.event(), task.device.event()
        start.record()
        try:
            task.run()
        except BaseException:
            # A failed backward must not leave work behind for the next one.
            self._queue.clear()
            raise
        end.record()
        self._completed += 1
        self._timed.append((start, end))
        if len(self._timed) >= _FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        self._dw_ms += sum(end.elapsed_ms(start) for start, end in self._timed)
        self._timed.clear()

    def _end_of_backward(self) -> None:
        while self._queue:
            self._run(self._queue.popleft(), "end of backward")

    def get_stats(self) -> dict[str, float]:
        """Counters since ``reset_stats``.

        ``total_dw_tasks``, ``completed_dw_tasks``, ``dw_flops`` and ``dw_ms`` (this rank), and from the AllToAlls
        ``a2a_count``, ``a2a_bytes`` (to other ranks), ``a2a_ms`` (those waited for at once), ``exposed_ms`` (time in
        waits), with bytes and ms per kind of exchange. Reading synchronises with the device's timing events.
        """
        self._fold()
        tasks = {"total_dw_tasks": self._total, "completed_dw_tasks": self._completed, "dw_flops": self._flops}
        return {**tasks, "dw_ms": self._dw_ms, **self.comm.as_dict()}

    def reset_stats(self) -> None:
        """Starts counting from zero."""
        self._total = self._completed = self._flops = 0
        self._dw_ms = 0.0
        self._timed: list[tuple[TimingEvent, TimingEvent]] = []
        self.comm.reset()

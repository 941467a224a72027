"""Runs weight gradients while an AllToAll is in flight.

    combine-backward AllToAll    ||  dW that the layers above left over (only with carry_over): FC2, the router,
                                     attention's linears, those of dense layers and shared experts
    dX of FC2, activation, dX of FC1: each hands its dW here
    dispatch-backward AllToAll   ||  dW of FC2, dW of FC1
    dX of the output projection: hands its dW here, under context parallelism (Ulysses)
    hp2sp-backward AllToAll      ||  half of that dW; with carry_over what the layer's MLP left
    attention
    sp2hp-backward AllToAll      ||  the other half; the rest of what the MLP left
    dX of qkv: hands its dW here with carry_over

Where a layer is recomputed in the backward, its forward's AllToAlls come once more before all that, and what the layers
above left over is shared out among those that follow each other, three, or with attention's five (more in chunks):

    sp2hp, hp2sp AllToAll        ||  a fifth of the tasks, a quarter of the rest
    dispatch AllToAll            ||  a third of the tasks
    combine AllToAll             ||  half of the rest
    combine-backward AllToAll    ||  the rest

That backward is one inside another (Megatron's checkpoint), and its end must not run what is carried: the outer one's
end does.

Which task runs in which flight follows from configuration and the graph alone, so every rank takes the same order,
whatever its load or clock. One scheduler serves one model; it is found through the model's layers and holds no
state outside itself. Backward runs on other threads than forward, so nothing here is thread-local.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from fluid_npu.comm.stats import CommStats
from fluid_npu.comm.transports import CollectiveTransport, Transport
from fluid_npu.device.base import TimingEvent
from fluid_npu.device.kernels.beside import beside_exchange
from fluid_npu.device.recorder import Recorder
from fluid_npu.schedule.tally import Tally
from fluid_npu.schedule.task import DWTask

_FOLD_AT = 2048

#: The autograd node that is being run, also by the backward inside which another one was started.
_current_node: Callable[[], object] = getattr(torch._C, "_current_autograd_node", lambda: None)

#: A layer's carried tasks are at most ten (FC2, router, shared experts, five linears of latent attention), and between
#: two MoE layers there may be one dense layer, of up to seven.
QUEUE_LIMIT = 20

#: What ``overlap`` may be. 'full' is 'dw' with MoE layers in chunks of experts (``schedule.pipeline``).
OVERLAP_MODES = ("off", "dw", "full")


class BackwardScheduler:
    """The queue of one model's dW tasks, and the sink of its AllToAlls.

    Args:
        overlap: 'off' runs each dW at once and waits for each AllToAll at once; 'dw' overlaps the two; 'full' is 'dw'
            for layers that also run in chunks.
        carry_over: lets dW wait for the combine of the layer below: that of the Fluid linears, and that of FC2 and the
            router if the DDP takes gradients late (``DistributedDataParallelConfig.delay_wgrad_compute``).
        queue_limit: tasks that may wait at a time, which bounds the activations that they keep alive; one more runs
            the oldest at once. A number of tasks, not of bytes: all ranks must come to the same order, and their bytes
            differ.
        transport: moves the bytes; None takes the collective of torch.distributed.
        name: how messages call this scheduler's model.

    Raises:
        ValueError: an overlap mode that does not exist, or a limit below 1.
    """

    _total: int
    _completed: int
    _flops: int
    _peak_tasks: int
    _peak_bytes: int
    _timed: list[tuple[TimingEvent, TimingEvent]]

    def __init__(
        self,
        overlap: str = "dw",
        *,
        carry_over: bool = False,
        queue_limit: int = QUEUE_LIMIT,
        transport: Transport | None = None,
        name: str = "unnamed model",
    ) -> None:
        if overlap not in OVERLAP_MODES:
            raise ValueError(f"overlap={overlap!r}: allowed are {', '.join(OVERLAP_MODES)}")
        if queue_limit < 1:
            raise ValueError(f"queue_limit={queue_limit}: at least 1 task must be allowed to wait; use overlap='off'")
        self.overlap = overlap
        self.queue_limit = queue_limit
        self.carry_over = carry_over and overlap != "off"
        self.transport: Transport = transport if transport is not None else CollectiveTransport()
        self.name = name
        #: The lowest MoE layer of each pipeline chunk on this rank, by the number of layers below the chunk.
        self.lowest: dict[int, int] = {}
        #: The same of its attentions that exchange heads or keys between context-parallel ranks.
        self.lowest_attention: dict[int, int] = {}
        self.comm = CommStats()
        self.recorder = Recorder()
        #: Exchanges of a pipeline that are launched and not yet used, and the pipeline's name.
        self.pipelined: dict[str, str] = {}
        self._twin = False
        self._queue: deque[DWTask] = deque()
        self._held_bytes = 0
        #: The backward in which layers are recomputed, whose end runs what is left.
        self._outer: int | None = None
        self.reset_stats()

    @property
    def lowest_layers(self) -> frozenset[int]:
        """Numbers of the lowest MoE layer of each chunk: below it there is no combine to wait for."""
        return frozenset(self.lowest.values())

    def combine_below(self, chunk: int, number: int) -> bool:
        """Whether the backward of a chunk's layer ``number`` is followed by that of another layer's combine."""
        return number > self.lowest.get(chunk, number)

    def flight_below(self, chunk: int, number: int) -> bool:
        """Whether that backward is followed by any exchange of another layer: a combine, or one of its attention."""
        return self.combine_below(chunk, number) or number > self.lowest_attention.get(chunk, number)

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

    @contextmanager
    def tallied(self) -> Iterator[Tally]:
        """Around work that is recorded and not done: what it would count goes into a ``Tally``; nothing is timed."""
        before = self.comm, self._total, self._completed, self._flops, self._timed
        tally = Tally()
        self.comm, self._timed = tally.comm, []
        try:
            yield tally
            tally.tasks, tally.flops = self._total - before[1], self._flops - before[3]
        finally:
            self.comm, self._total, self._completed, self._flops, self._timed = before

    def count_again(self, tally: Tally) -> None:
        """Counts what was recorded, once it is replayed. Its tasks are in no queue and have no times."""
        self._total += tally.tasks
        self._completed += tally.tasks
        self._flops += tally.flops
        for exchange in tally.comm.exchanges:
            self.comm.count(*exchange)

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
        if len(self._queue) >= self.queue_limit:
            self._queue_full += 1
            self._run(self._take(), "queue full")
        self._queue.append(task)
        self._held_bytes += task.held_bytes
        self._peak_tasks = max(self._peak_tasks, len(self._queue))
        self._peak_bytes = max(self._peak_bytes, self._held_bytes)

    def run_now(self, task: DWTask, region: str = "at once") -> None:
        """Counts and runs a task that shall not wait, such as one beside a collective of its own (``region``)."""
        self._total += 1
        self._flops += task.flops
        self._run(task, region)

    def computing(self, name: str) -> AbstractContextManager[None]:
        """Around a pipeline's computation beside what is ``pipelined``; ``schedule.lanes`` puts a clock there."""
        return nullcontext()

    def _take(self) -> DWTask:
        task = self._queue.popleft()
        self._held_bytes -= task.held_bytes
        return task

    def fill(self, comm_type: str, name: str) -> None:
        """Runs what may run beside the backward of this exchange, oldest first.

        The combine takes everything; the dispatch leaves tasks marked ``carry`` for the combine below; others leave
        what waits for another kind of exchange.
        """
        kept: deque[DWTask] = deque()
        while self._queue:
            if self._queue[0].fits(comm_type):
                self._run(self._take(), f"backward of {name}", beside=True)
            else:
                kept.append(self._queue.popleft())
        self._queue = kept

    def fill_again(self, name: str, gaps: int) -> None:
        """Runs a share of what is queued beside an exchange of a forward that is repeated in a backward (recompute).

        ``gaps``: this exchange and those that follow up to the backward of the layer's combine, which takes the rest.
        Tasks are counted and not weighed, since their rows differ between ranks. In any other forward nothing is run.
        """
        graph = torch._C._current_graph_task_id()
        if graph < 0:
            self._outer = None  # what a failed backward left open
            return
        if self._outer != graph:
            self._outer = graph
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_outer)
        for _ in range(-(-len(self._queue) // gaps)):
            self._run(self._take(), f"recompute of {name}", beside=True)

    def _run(self, task: DWTask, region: str, beside: bool = False) -> None:
        self.recorder.add("dw", task.name, region=region)
        start, end = task.device.event(), task.device.event()
        start.record()
        try:
            with beside_exchange(beside):
                task.run()
        except BaseException:
            # A failed backward must not leave work behind for the next one.
            self._queue.clear()
            self._held_bytes = 0
            raise
        end.record()
        self._completed += 1
        self._timed.append((start, end))
        if len(self._timed) >= _FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        self._dw_ms += sum(end.elapsed_ms(start) for start, end in self._timed)
        self._timed.clear()

    def run_queue(self, region: str) -> None:
        """Runs all that waits, oldest first; ``region`` says beside what."""
        while self._queue:
            self._run(self._take(), region)

    def _end_of_backward(self) -> None:
        if self._outer is None or _current_node() is None:
            self.run_queue("end of backward")

    def _end_of_outer(self) -> None:
        self._outer = None
        self.run_queue("end of backward")

    def get_stats(self) -> dict[str, float]:
        """Counters since ``reset_stats``.

        ``total_dw_tasks``, ``completed_dw_tasks``, ``dw_flops`` and ``dw_ms`` (this rank); of the queue the most tasks
        that waited at a time and the bytes that they held (``queue_peak_tasks``, ``queue_peak_bytes``), and
        ``queue_full``, the tasks that ran early because of its limit; and from the AllToAlls
        ``a2a_count``, ``a2a_bytes`` (to other ranks), ``a2a_ms`` (those waited for at once), ``exposed_ms`` (time in
        waits), with bytes and ms per kind of exchange. Reading synchronises with the device's timing events.
        """
        self._fold()
        tasks = {"total_dw_tasks": self._total, "completed_dw_tasks": self._completed, "dw_flops": self._flops}
        queue = {
            "queue_peak_tasks": self._peak_tasks,
            "queue_peak_bytes": self._peak_bytes,
            "queue_full": self._queue_full,
        }
        return {**tasks, **queue, "dw_ms": self._dw_ms, **self.comm.as_dict()}

    def reset_stats(self) -> None:
        """Starts counting from zero."""
        self._total = self._completed = self._flops = 0
        self._peak_tasks = self._peak_bytes = self._queue_full = 0
        self._dw_ms = 0.0
        self._timed = []
        self.comm.reset()

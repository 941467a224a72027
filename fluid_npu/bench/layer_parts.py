"""Where the time of one layer goes: every moment of a step belongs to one part, so the parts sum to the step.

Marks are events on the device's stream: at the border of each module in forward, and in backward when the gradient of
its output is there. AllToAlls (the host's launch, and the wait), dW tasks and the accumulation into main_grad are
parts of their own wherever they happen. On CUDA a part is the time in which its kernels ran, from one profiled step,
and what remains of the step without marks is 'idle': launches, gaps and waits for a peer.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fluid_npu.device import Device
from fluid_npu.schedule import pipeline
from fluid_npu.schedule.task import DWTask

_MARK = "spin_kernel"
#: What layers in chunks run of their experts.
_PIECES = ("mlp_up", "mlp_down", "mlp_backward")
PARTS = ("attention", "norms", "linear", "a2a", "experts", "router_permute", "grad_accumulation", "idle", "rest")


class Timeline:
    """Marks of one step. ``part`` does nothing until ``begin``, so it may stay in timed code."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._marked: set[int] = set()
        self._current = "rest"
        self._on = False
        self._on_mark: Callable[[], Any] | None = None

    def begin(self, on_mark: Callable[[], Any] | None = None) -> None:
        """A step begins; ``on_mark`` is called at every mark."""
        self._marks, self._marked, self._on, self._on_mark = [], set(), True, on_mark
        self.switch("rest")

    def end(self) -> dict[str, float]:
        """The step has ended: milliseconds of each part."""
        self.parts()
        self._device.synchronize()
        ms: dict[str, float] = defaultdict(float)
        for (part, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            ms[part] += stop.elapsed_ms(start)
        return dict(ms)

    def parts(self) -> list[str]:
        """The step has ended: the part after each mark, the last one's end."""
        self._current = ""
        self.switch("rest")
        self._on = False
        return [part for part, _ in self._marks]

    def switch(self, part: str) -> str:
        """From here on time is this part's; returns the one before."""
        before, self._current = self._current, part
        if self._on and (part != before or not self._marks):
            event = self._device.event()
            event.record()
            if self._on_mark is not None:
                self._on_mark()
            self._marks.append((part, event))
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The body is of this part."""
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def in_backward(self, tensors: Any, part: str, *, overwrite: bool) -> None:
        """When the gradient of one of these is there, time becomes this part's."""
        for tensor in tensors if isinstance(tensors, (tuple, list)) else (tensors,):
            node = getattr(tensor, "grad_fn", None)
            if node is None or (id(node) in self._marked and not overwrite):
                continue
            self._marked.add(id(node))
            node.register_prehook(lambda *_: self.switch(part) and None)


@contextmanager
def watched(timeline: Timeline, layer: Any, variant: Any) -> Iterator[None]:
    """Marks at the borders of a Megatron layer's modules, of AllToAlls, dW tasks and gradient accumulation."""
    undo: list[Callable[[], Any]] = []
    for module, part in _modules(layer):
        undo += _watch(timeline, module, part)
    for parameter in layer.parameters():
        undo += _watch_accumulation(timeline, parameter)
    if variant.scheduler is not None:
        undo.append(_watch_tasks(timeline, variant.scheduler))
        undo.append(_watch_transport(timeline, variant.scheduler))
    undo += [_watch_function(timeline, pipeline, name, "experts") for name in _PIECES]
    exchange = dist.all_to_all_single

    def timed_exchange(*args: Any, **kwargs: Any) -> Any:
        with timeline.part("a2a"):
            work = exchange(*args, **kwargs)
        return _TimedWork(work, timeline) if kwargs.get("async_op") else work

    try:
        with mock.patch.object(dist, "all_to_all_single", timed_exchange):
            yield
    finally:
        for one in undo:
            one()


@dataclasses.dataclass
class _TimedWork:
    """An exchange under way, or one that lands in its transport's memory."""

    work: Any
    timeline: Timeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)

    def wait(self) -> Any:
        with self.timeline.part("a2a"):
            return self.work.wait()


def _modules(layer: Any) -> Iterator[tuple[torch.nn.Module, str]]:
    """Modules and their parts, outer before inner."""
    for name, module in layer.named_modules():
        own = name.rpartition(".")[2]
        inside_experts = "experts" in name.split(".")[:-1] or "shared_experts" in name.split(".")[:-1]
        if inside_experts:
            continue
        if own == "mlp":
            yield module, "router_permute"
        elif own in ("experts", "shared_experts"):
            yield module, "experts"
        elif own == "router":
            yield module, "router_permute"
        elif own.endswith("layernorm"):
            yield module, "norms"
        elif own.startswith("linear_"):
            yield module, "linear"
        elif own == "core_attention":
            yield module, "attention"


def _watch(timeline: Timeline, module: torch.nn.Module, part: str) -> list[Callable[[], Any]]:
    outer: list[str] = []

    def enter(_: Any, inputs: Any, kwargs: Any) -> None:
        outer.append(timeline.switch(part))
        timeline.in_backward([*inputs, *kwargs.values()], outer[-1], overwrite=False)

    def leave(_: Any, inputs: Any, output: Any) -> None:
        timeline.in_backward(output, part, overwrite=True)
        timeline.switch(outer.pop())

    handles = (module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave))
    return [handle.remove for handle in handles]


def _watch_accumulation(timeline: Timeline, parameter: torch.nn.Parameter) -> list[Callable[[], Any]]:
    """Around the node that stores a weight's gradient; Megatron's DDP adds it to main_grad in a hook of that node."""
    if not parameter.requires_grad:
        return []
    node: Any = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    before: list[str] = []
    handles = (
        node.register_prehook(lambda *_: before.append(timeline.switch("grad_accumulation"))),
        node.register_hook(lambda *_: timeline.switch(before.pop()) and None),
    )

    def undo(_node: Any = node) -> None:  # holds the node, which lives only as long as someone does
        for handle in handles:
            handle.remove()

    return [undo]


class _TimedTransport:
    """A transport whose launches and waits are the AllToAll's part."""

    def __init__(self, inner: Any, timeline: Timeline) -> None:
        self._inner, self._timeline = inner, timeline

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("start", "land"):
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._timeline.part("a2a"):
                work = found(*args, **kwargs)
            return None if work is None else _TimedWork(work, self._timeline)

        return timed


def _watch_transport(timeline: Timeline, scheduler: Any) -> Callable[[], Any]:
    inner = scheduler.transport
    scheduler.transport = _TimedTransport(inner, timeline)

    def restore() -> None:
        scheduler.transport = inner

    return restore


def _watch_function(timeline: Timeline, module: Any, name: str, part: str) -> Callable[[], Any]:
    """Layers in chunks run their experts without calling the module."""
    function = getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with timeline.part(part):
            return function(*args, **kwargs)

    setattr(module, name, timed)
    return lambda: setattr(module, name, function)


def _watch_tasks(timeline: Timeline, scheduler: Any) -> Callable[[], Any]:
    submit = scheduler.submit

    def timed(task: DWTask) -> None:
        def run() -> None:
            with timeline.part("router_permute" if "router" in task.name else "experts"):
                task.run()

        submit(dataclasses.replace(task, run=run))

    scheduler.submit = timed

    def restore() -> None:
        del scheduler.submit

    return restore


def busy_parts(device: Device, timeline: Timeline, step: Callable[[], Any]) -> dict[str, float] | None:
    """Milliseconds of each part in which at least one kernel ran, from profiled steps; None where it cannot be told.

    Each mark launches a kernel of its own name, so the profiler's record of kernels falls into parts. Of two steps the
    one with less work: what the profiler does at its first use makes kernels beside it take longer.
    """
    if device.name != "cuda":
        return None
    found = [one for one in (_profiled(device, timeline, step) for _ in range(2)) if one is not None]
    return min(found, key=lambda parts: sum(parts.values()), default=None)


def _profiled(device: Device, timeline: Timeline, step: Callable[[], Any]) -> dict[str, float] | None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recording:
        timeline.begin(lambda: torch.cuda._sleep(1))
        step()
        parts = timeline.parts()
        device.synchronize()
    kernels = [
        (e.name(), e.start_ns(), e.start_ns() + e.duration_ns())
        for e in recording.profiler.kineto_results.events()
        if "CUDA" in str(e.device_type()) and not e.name().startswith("nccl:")
    ]
    marks = sorted((start, stop) for name, start, stop in kernels if _MARK in name)
    work = [(start, stop) for name, start, stop in kernels if _MARK not in name]
    return _busy(parts, marks, work) if len(marks) == len(parts) else None


def _busy(parts: Sequence[str], marks: Sequence[tuple[int, int]], work: Sequence[tuple[int, int]]) -> dict[str, float]:
    ms: dict[str, float] = defaultdict(float)
    for part, (_, first), (last, _) in zip(parts, marks, marks[1:], strict=False):
        ms[part] += union([(max(a, first), min(b, last)) for a, b in work if a < last and b > first]) / 1e6
    return dict(ms)


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Length that the spans cover together."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered

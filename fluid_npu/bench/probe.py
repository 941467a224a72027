"""What an AllToAll of a step takes by itself, and how much dW the graph lets run beside it.

Measured in a few extra steps of the serialised twin, outside the timed rounds. The transfer of an exchange starts
when its last rank has arrived, so it is the shortest time of any rank from launch to completion. What may run beside
an exchange is the dW that the scheduler runs in its flight, on each rank its own.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fluid_npu.device import Device
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.schedule.task import DWTask
from fluid_npu.train.parallel import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exposure:
    """Milliseconds of a step: all AllToAlls; those with dW beside them; that dW; and what it could cover at most."""

    a2a_ms: float
    with_dw_ms: float = 0.0
    dw_ms: float = 0.0
    coverable_ms: float = 0.0


def probe_fluid(scheduler: BackwardScheduler, step: Callable[[], Any], place: Place, repeats: int = 5) -> Exposure:
    """The exposure of a step of ours, the median of some; every AllToAll must be waited for at once. Collective."""
    found = []
    for _ in range(repeats):
        dist.barrier()
        with _instruments(scheduler, place.device) as clock:
            step()
        found.append(_exposure(clock, place))
    return _median(found)


def probe_stock(step: Callable[[], Any], place: Place, repeats: int = 5) -> Exposure:
    """``a2a_ms`` of a stock step, whose AllToAlls block. Collective."""
    found = []
    for _ in range(repeats):
        dist.barrier()
        spans = _Spans(place.device)
        with mock.patch.object(dist, "all_to_all_single", spans.around(dist.all_to_all_single)):
            step()
        found.append(Exposure(a2a_ms=sum(_shortest(spans.milliseconds(), place))))
    return _median(found)


class _Spans:
    """Pairs of timing events."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []

    def begin(self) -> Any:
        start, end = self._device.event(), self._device.event()
        start.record()
        self._pairs.append((start, end))
        return end

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("async_op"):
                return function(*args, **kwargs)
            end = self.begin()
            result = function(*args, **kwargs)
            end.record()
            return result

        return timed

    def milliseconds(self) -> list[float]:
        return [end.elapsed_ms(start) for start, end in self._pairs]


class _ClockedTransport:
    """Times each exchange of the inner transport from its start to its wait."""

    def __init__(self, inner: Any, spans: _Spans) -> None:
        self.name, self._inner, self._spans = inner.name, inner, spans

    def start(self, *args: Any) -> Any:
        end = self._spans.begin()
        return _ClockedWork(self._inner.start(*args), end)


class _ClockedWork:
    def __init__(self, work: Any, end: Any) -> None:
        self._work, self._end = work, end

    def wait(self) -> None:
        self._work.wait()
        self._end.record()


@dataclasses.dataclass(frozen=True)
class _Clock:
    scheduler: BackwardScheduler
    exchanges: _Spans
    tasks: _Spans


@contextmanager
def _instruments(scheduler: BackwardScheduler, device: Device) -> Iterator[_Clock]:
    """Clocks around the transport and every dW task, and the record that says which ran beside which."""
    clock = _Clock(scheduler, _Spans(device), _Spans(device))
    submit, transport, recording = scheduler.submit, scheduler.transport, scheduler.recorder.enabled

    def timed_submit(task: DWTask) -> None:
        def run() -> None:
            end = clock.tasks.begin()
            task.run()
            end.record()

        submit(dataclasses.replace(task, run=run))

    scheduler.recorder.take()
    scheduler.recorder.enabled = True
    scheduler.transport = _ClockedTransport(transport, clock.exchanges)
    scheduler.submit = timed_submit  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        scheduler.recorder.enabled, scheduler.transport = recording, transport
        del scheduler.submit


def _exposure(clock: _Clock, place: Place) -> Exposure:
    records = clock.scheduler.recorder.take()
    launches = [record.name for record in records if record.kind == "launch"]
    regions = [record.detail["region"] for record in records if record.kind == "dw"]
    dw_ms: dict[str, float] = defaultdict(float)
    for region, ms in zip(regions, clock.tasks.milliseconds(), strict=True):
        dw_ms[region] += ms
    transfers = list(zip(launches, _shortest(clock.exchanges.milliseconds(), place), strict=True))
    beside = [(ms, dw_ms[name]) for name, ms in transfers if name in dw_ms]
    return Exposure(
        a2a_ms=sum(ms for _, ms in transfers),
        with_dw_ms=sum(ms for ms, _ in beside),
        dw_ms=_mean(sum(dw for _, dw in beside), place),
        coverable_ms=_mean(sum(min(pair) for pair in beside), place),
    )


def _shortest(ms: Sequence[float], place: Place) -> list[float]:
    """Element by element the least of any rank. Collective; all ranks make the same exchanges."""
    return _reduced(list(ms), place, dist.ReduceOp.MIN)


def _mean(ms: float, place: Place) -> float:
    return _reduced([ms], place, dist.ReduceOp.SUM)[0] / place.world


def _reduced(ms: list[float], place: Place, op: Any) -> list[float]:
    values = torch.tensor(ms, dtype=torch.float32, device=place.device.torch_device(place.local_rank))
    dist.all_reduce(values, op=op)
    return [float(value) for value in values.tolist()]


def _median(found: Sequence[Exposure]) -> Exposure:
    names = [item.name for item in dataclasses.fields(Exposure)]
    return Exposure(**{name: median(getattr(exposure, name) for exposure in found) for name in names})

"""What the AllToAlls of a step take by themselves, and what the graph lets run beside them (``schedule.definitions``).

Measured in a few extra steps of the serialised twin, outside the timed rounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fluid_npu.device import Device
from fluid_npu.schedule.definitions import Coverage, Exchange, coverage, median_coverage
from fluid_npu.schedule.lanes import Lanes
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.train.parallel import Place


def probe_fluid(
    scheduler: BackwardScheduler,
    step: Callable[[], Any],
    place: Place,
    repeats: int = 5,
    modules: Sequence[torch.nn.Module] = (),
) -> Coverage:
    """The coverage of a step of ours, the median of some; every AllToAll must be waited for at once. Collective."""
    found = []
    with Lanes(scheduler, place.device, modules) as lanes:
        for _ in range(repeats):
            dist.barrier()
            lanes.begin()
            step()
            found.append(coverage(every_rank(lanes.take(), place)))
    return median_coverage(found)


def probe_stock(step: Callable[[], Any], place: Place, repeats: int = 5) -> Coverage:
    """The transfer of a stock step, whose AllToAlls block. Collective."""
    found = []
    for _ in range(repeats):
        dist.barrier()
        spans = _Spans(place.device)
        with mock.patch.object(dist, "all_to_all_single", spans.around(dist.all_to_all_single)):
            step()
        found.append(coverage(every_rank(spans.exchanges(place), place)))
    return median_coverage(found)


def every_rank(exchanges: Sequence[Exchange], place: Place) -> list[list[Exchange]]:
    """The exchanges of all ranks, on every rank. Collective."""
    every: list[Any] = [None] * place.world
    dist.all_gather_object(every, [dataclasses.replace(exchange, group=None) for exchange in exchanges])
    return every


class _Spans:
    """Pairs of timing events around blocking AllToAlls."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("async_op"):
                return function(*args, **kwargs)
            start, end = self._device.event(), self._device.event()
            start.record()
            result = function(*args, **kwargs)
            end.record()
            self._pairs.append((start, end))
            return result

        return timed

    def exchanges(self, place: Place) -> list[Exchange]:
        ranks = tuple(range(place.world))
        times = [end.elapsed_ms(start) for start, end in self._pairs]
        return [
            Exchange(name="", ranks=ranks, bytes_to_peers=0, flight_ms=ms, wait_ms=ms, at_once=True) for ms in times
        ]

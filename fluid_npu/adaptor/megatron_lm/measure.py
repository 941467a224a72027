"""Wraps Megatron-LM's step and loop: twins every N-th step, and the report when training ends, however it ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

from fluid_npu.adaptor.megatron_lm.report import write_report
from fluid_npu.device import get_device
from fluid_npu.schedule.hidden import OverlapStats, TwinClock, is_twin
from fluid_npu.schedule.scheduler import BackwardScheduler

_WARM_UP = 2  # the first steps allocate buffers and plan


class Meter:
    """Step times and counters of one training run on this rank."""

    def __init__(self, model: Sequence[Any]) -> None:
        self.schedulers = schedulers_of(model)
        self.steps = 0
        self.totals: dict[str, float] = {}
        self.hidden = OverlapStats()
        self._clock = TwinClock(self.schedulers, get_device().value, _shared_experts(model))

    @contextlib.contextmanager
    def step(self, every: int) -> Iterator[None]:
        """Runs the body as one step, every so many as the serialised twin (0: never)."""
        self.steps += 1
        twin = every > 0 and bool(self.schedulers) and is_twin(self.steps, self.schedulers[0].overlap, every)
        for scheduler in self.schedulers:
            scheduler.reset_stats()
        with self._clock.twin() if twin else contextlib.nullcontext():
            started = time.perf_counter()
            yield
        if every > 0:
            # Only where hidden time is measured: the host must wait for the device to time a step.
            get_device().value.synchronize()
        elapsed = (time.perf_counter() - started) * 1e3
        counters = summed(self.schedulers)
        for name, value in counters.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        if every > 0 and self.steps > _WARM_UP:
            self.hidden.add(elapsed, self._clock.coverage() if twin else None)


_meter: Meter | None = None


def stepped(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``train_step``."""

    @wraps(original)
    def train_step(forward_step_func: Any, data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if _meter is None:
            return original(forward_step_func, data_iterator, model, *args, **kwargs)
        with _meter.step(get_args().fluid_twin_every):
            return original(forward_step_func, data_iterator, model, *args, **kwargs)

    return train_step


def trained(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``train``."""

    @wraps(original)
    def train(forward_step_func: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        global _meter
        _meter = meter = Meter(model) if get_args().fluid_report is not None or get_args().fluid_twin_every else None
        try:
            return original(forward_step_func, model, *args, **kwargs)
        finally:
            _meter = None
            if meter is not None:
                write_report(get_args(), meter.totals, meter.steps, meter.hidden, meter.schedulers)

    return train


def schedulers_of(model: Sequence[Any]) -> list[BackwardScheduler]:
    """The schedulers of a rank's model chunks, each once."""
    found: dict[int, BackwardScheduler] = {}
    for chunk in model:
        for module in chunk.modules():
            scheduler = getattr(module, "backward_scheduler", None)
            if isinstance(scheduler, BackwardScheduler):
                found[id(scheduler)] = scheduler
    return list(found.values())


def _shared_experts(model: Sequence[Any]) -> list[Any]:
    layers = (module for chunk in model for module in chunk.modules() if hasattr(module, "backward_scheduler"))
    found = (getattr(layer, "shared_experts", None) for layer in layers)
    return [module for module in found if module is not None]


def summed(schedulers: Sequence[BackwardScheduler]) -> dict[str, float]:
    """The counters of all schedulers together."""
    totals: dict[str, float] = {}
    for scheduler in schedulers:
        for name, value in scheduler.get_stats().items():
            totals[name] = totals.get(name, 0.0) + value
    return totals

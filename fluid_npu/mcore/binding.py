"""Which layers belong to one model: they get one scheduler.

A Layer Spec builds layers one by one and may be used for several models. A layer number that comes a second time, or
another configuration, starts the next model; the chunks of an interleaved pipeline have disjoint numbers and share.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

from fluid_npu.comm.transports import Transport
from fluid_npu.schedule.live import register
from fluid_npu.schedule.scheduler import BackwardScheduler

if TYPE_CHECKING:
    from fluid_npu.mcore.moe_layer import FluidMoELayer

_NUMBERS = itertools.count(1)


class SchedulerBinder:
    """Hands out schedulers; one binder per Layer Spec. Arguments as ``BackwardScheduler``."""

    def __init__(self, overlap: str = "dw", *, carry_over: bool = False, transport: Transport | None = None) -> None:
        self._settings: dict[str, Any] = {"overlap": overlap, "carry_over": carry_over, "transport": transport}
        # Checked here so that a wrong value is refused where it was written.
        BackwardScheduler(**self._settings)
        self._layers: dict[int, weakref.ref[FluidMoELayer]] = {}
        self._config: Any = None
        self._scheduler: weakref.ref[BackwardScheduler] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerBinder:
        # Megatron copies specs per layer; copies must still give one scheduler per model.
        return self

    def bind(self, layer: FluidMoELayer, number: int | None) -> BackwardScheduler:
        """The scheduler of the model that ``layer`` belongs to."""
        if number is None:
            return getattr(layer, "backward_scheduler", None) or self._new(layer, "a layer alone")
        current = self._scheduler() if self._scheduler is not None else None
        holder = self._layers[number]() if number in self._layers else None
        taken = holder is not None and holder is not layer
        if current is None or taken or layer.config is not self._config:
            self._layers = {}
            self._config = layer.config
            current = self._new(layer, f"model {next(_NUMBERS)}")
            self._scheduler = weakref.ref(current)
        self._layers[number] = weakref.ref(layer)
        current.lowest_layer = min(self._layers)
        return current

    def _new(self, layer: FluidMoELayer, whose: str) -> BackwardScheduler:
        config = layer.config
        sizes = f"hidden {config.hidden_size}, {config.num_moe_experts} experts, top-{config.moe_router_topk}"
        return register(BackwardScheduler(**self._settings, name=f"{whose}: {sizes}"))

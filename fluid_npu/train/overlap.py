"""Whether AllToAll is overlapped with dW, decided equally by all ranks, and how much of it was hidden."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch.distributed as dist

from fluid_npu.device import Choice
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.parallel import Place


def choose_overlap(config: TrainConfig, place: Place) -> Choice[str]:
    """'dw' or 'off' and why. Collective: host names are gathered, so that no rank decides alone."""
    if config.impl == "stock":
        return Choice("off", "stock Megatron has no overlap")
    if config.overlap != "auto":
        return Choice(config.overlap, "as asked")
    if config.ep == 1:
        return Choice("off", "with --ep 1 there is no AllToAll")
    hosts: list[str | None] = [None] * place.world
    dist.all_gather_object(hosts, platform.node())
    if place.device.name != "cpu":
        return Choice("dw", f"the {place.device.name} computes dW while the AllToAll flies")
    if config.plant_delay_ms > 0:
        return Choice("dw", f"every AllToAll is delayed by {config.plant_delay_ms:g} ms")
    if len(set(hosts)) > 1:
        return Choice("dw", f"the ranks are on {len(set(hosts))} machines, a network lies between them")
    return Choice("off", "on one machine's loopback the copy itself is CPU work, so nothing can hide")


def is_twin(step: int, overlap: str, every: int) -> bool:
    """Whether a step (counted from 1) runs as its serialised twin: a function of the step's number alone."""
    return overlap != "off" and step % every == 0


@dataclass
class OverlapStats:
    """Step times of overlapped steps and of twins, warm-up left out."""

    carry_over: bool = False
    overlapped_ms: list[float] = field(default_factory=list)
    twin_ms: list[float] = field(default_factory=list)
    coverable_ms: list[float] = field(default_factory=list)

    def add(self, step_ms: float, counters: Mapping[str, float], *, twin: bool) -> None:
        """Takes one step; ``counters`` are the scheduler's of that step."""
        (self.twin_ms if twin else self.overlapped_ms).append(step_ms)
        if twin:
            # dW may run beside the dispatch's backward (carried over: beside the combine's too), and no more of
            # either than the other lasts.
            flights = counters.get("moe_dispatch_backward_ms", 0.0)
            flights += counters.get("moe_combine_backward_ms", 0.0) if self.carry_over else 0.0
            self.coverable_ms.append(min(flights, counters.get("dw_ms", 0.0)))

    def report(self, overlap: str) -> dict[str, float | None]:
        """hidden_ms, signed, and hidden_fraction; 0 and None with overlap off, None where no twin ran."""
        if overlap == "off":
            return {"hidden_ms": 0.0, "hidden_fraction": None}
        if not self.twin_ms or not self.overlapped_ms:
            return {"hidden_ms": None, "hidden_fraction": None}
        hidden = median(self.twin_ms) - median(self.overlapped_ms)
        coverable = median(self.coverable_ms)
        return {"hidden_ms": hidden, "hidden_fraction": hidden / coverable if coverable > 0 else None}


def as_dict(choice: Choice[str]) -> dict[str, Any]:
    """For summary.json."""
    return {"value": choice.value, "reason": choice.reason}

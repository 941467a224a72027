"""Whether AllToAll is overlapped with dW, decided equally by all ranks."""

from __future__ import annotations

import platform
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
    if config.ep == 1 and config.cp == 1:
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


def as_dict(choice: Choice[str]) -> dict[str, Any]:
    """For summary.json."""
    return {"value": choice.value, "reason": choice.reason}

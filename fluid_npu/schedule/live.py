"""Finds the scheduler of a model. The set below only lists what is alive; nothing is shared through it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from fluid_npu.schedule.scheduler import BackwardScheduler

_LIVE: weakref.WeakSet[BackwardScheduler] = weakref.WeakSet()


def register(scheduler: BackwardScheduler) -> BackwardScheduler:
    """Makes a scheduler findable for as long as a model holds it."""
    _LIVE.add(scheduler)
    return scheduler


def get_backward_scheduler(model: torch.nn.Module | Sequence[torch.nn.Module] | None = None) -> BackwardScheduler:
    """The scheduler of ``model`` (or of its chunks on this rank), or without a model the only live one.

    Raises:
        LookupError: the model has no Fluid layer or layers of several schedulers; or, without a model, no
            scheduler or several are alive, which are then named.
    """
    if model is None:
        return _only(list(_LIVE), "get_backward_scheduler()")
    found: dict[int, BackwardScheduler] = {}
    for chunk in [model] if isinstance(model, torch.nn.Module) else model:
        for module in chunk.modules():
            scheduler = getattr(module, "backward_scheduler", None)
            if isinstance(scheduler, BackwardScheduler):
                found[id(scheduler)] = scheduler
    return _only(list(found.values()), f"get_backward_scheduler({type(model).__name__})")


def _only(schedulers: list[BackwardScheduler], call: str) -> BackwardScheduler:
    if len(schedulers) == 1:
        return schedulers[0]
    if not schedulers:
        raise LookupError(f"{call}: no Fluid layer found; build the model with get_fluid_moe_layer_spec()")
    names = "; ".join(sorted(scheduler.name for scheduler in schedulers))
    raise LookupError(f"{call}: {len(schedulers)} schedulers are alive ({names}); pass the model you mean")

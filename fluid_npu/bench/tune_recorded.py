"""Recorded layers among the settings of ``fluid-npu tune``: what is checked and timed is their replay.

A recording keeps its memory for itself, layer by layer, where layers as ever share what their backward needs. A tuned
model has few layers; what those of the whole model would keep must fit the device, or the setting is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.bench.agreement import Disagreement, names_over_ranks
from fluid_npu.bench.memory import capacity_mb, recordings_mb
from fluid_npu.bench.rig import Variant
from fluid_npu.schedule.graphed import MOST_WARM_UP as CALLS_BEFORE_RECORDING
from fluid_npu.train.model import moe_layers
from fluid_npu.train.parallel import Place
from fluid_npu.train.presets import get_preset


def recorded_mb(variant: Variant, batch: Any, place: Place) -> float:
    """Runs a variant until its MoE layers are replayed; MiB that the recordings keep on the rank that keeps most.

    Collective. Raises Disagreement on all ranks alike where a layer was not recorded, or where those of the whole
    model would not fit the device.
    """
    for _ in range(CALLS_BEFORE_RECORDING + 1):
        variant.forward_backward(batch)
    layers: list[Any] = list(moe_layers(variant.model))
    missing = names_over_ranks([layer.label for layer in layers if not layer.graphed.recorded])
    if missing:
        raise Disagreement(f"{', '.join(missing)} could not be recorded; the reason is said above")
    kept, capacity = _over_ranks(place, recordings_mb(variant.model), capacity_mb(place.device))
    whole = kept / len(layers) * _layers_of_a_rank(variant)
    if whole > capacity:
        raise Disagreement(
            f"the recordings of the {_layers_of_a_rank(variant)} MoE layers of {variant.config.preset} would keep "
            f"{whole:.0f} MiB, and a device has {capacity:.0f}"
        )
    return kept


def _layers_of_a_rank(variant: Variant) -> int:
    """MoE layers of the whole model, which the tuned one is cut from."""
    return max(get_preset(variant.config.preset).moe_layers, variant.config.model().moe_layers)


def _over_ranks(place: Place, kept: float, capacity: float) -> tuple[float, float]:
    """The most that a rank keeps, and the least that one has. Collective."""
    both = torch.tensor([kept, -capacity], dtype=torch.float64, device=place.device.torch_device(place.local_rank))
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return float(both[0]), -float(both[1])

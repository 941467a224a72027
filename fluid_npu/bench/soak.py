"""Many steps of one MoE layer under routing that changes with every step: nothing may be kept from step to step.

Counted after a third of the steps and at the end, on every rank: bytes that tensors hold on the device (on a CPU: this
process's resident memory), tensors, Python objects of this package, file descriptors, threads. ``scripts/soak.py`` is
the command.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from fluid_npu.bench.layer_impls import KINDS, LayerVariant, unavailable
from fluid_npu.bench.rig import Kind, MockData
from fluid_npu.device.choice import Choice
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.parallel import Place

#: What a reading may exceed the first by. Python's own allocator and gloo's buffers move resident memory by a little,
#: and of the last step an object or two may still be alive; what is kept at every step is hundreds.
ALLOWED = {"device_bytes": 0, "resident_mib": 8, "tensors": 0, "objects": 8, "descriptors": 0, "threads": 0}


#: A thread that looks after exchanges drops those that have ended at its next look (peer_watch: every 0.25 s).
_SETTLED_S = 0.6


def measure(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """What grew under each of ``options["impls"]`` in ``options["steps"]`` steps; the worst rank of each."""
    config = replace(config, device=place.device.name)
    rows = []
    for name in options["impls"]:
        made = _made(KINDS[name], config, place)
        if made.value is None:
            rows.append({"impl": name, "left_out": made.reason})
        else:
            rows.append(_row(name, _grown(made.value, config, options, place), place))
    result = {"rows": rows, "steps": options["steps"], "device": place.device.name}
    return {**result, "problems": _problems(rows)}


def _made(kind: Kind, config: TrainConfig, place: Place) -> Choice[LayerVariant | None]:
    """The layer, or why there is none here; the same on all ranks, who have the same devices."""
    reason = unavailable(kind, config)
    if reason is not None:
        return Choice(None, reason)
    try:
        return Choice(LayerVariant(kind, replace(config, impl=kind.impl), place, None), "as asked")
    except ValueError as error:  # a form that this device cannot have, such as graphs on a CPU
        return Choice(None, str(error))


def _problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What grew more than it may, in words."""
    return [
        f"{row['impl']}: {what} grew by {row[what]:g} in the last two thirds of the steps, allowed {allowed}"
        for row in rows
        if "left_out" not in row
        for what, allowed in ALLOWED.items()
        if row[what] > allowed
    ]


def _row(name: str, grown: dict[str, float], place: Place) -> dict[str, Any]:
    every: list[Any] = [None] * place.world
    dist.all_gather_object(every, grown)
    return {"impl": name, **{what: max(one[what] for one in every) for what in grown}}


def _grown(variant: LayerVariant, config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, float]:
    steps = options["steps"]
    routed = _Routed(variant)
    x, dy = MockData(config, place).layer_input(0)
    draw = torch.Generator(device=x.device).manual_seed(config.seed + place.rank)
    first: dict[str, float] = {}
    for step in range(1, steps + 1):
        tokens = torch.randn(x.shape, generator=draw, device=x.device).to(x.dtype).requires_grad_()
        variant.layer.mlp(tokens)[0].backward(dy)
        del tokens
        if step == max(1, steps // 3):
            first = _reading(variant, place)
    last = _reading(variant, place)
    return {**{what: last[what] - first[what] for what in first}, **routed.rows()}


class _Routed:
    """The fewest and the most (token, expert) pairs that this rank sent to the first rank's experts."""

    def __init__(self, variant: LayerVariant) -> None:
        router = variant.layer.mlp.router
        self._local = router.config.num_moe_experts // router.config.expert_model_parallel_size
        self._found: list[torch.Tensor] = []
        router.register_forward_hook(self._count)

    def _count(self, _router: Any, _inputs: Any, output: Any) -> None:
        rows = output[1][:, : self._local].sum()  # stays on the device: a step waits for no figure
        fewest, most = self._found or (rows, rows)
        self._found = [torch.minimum(fewest, rows), torch.maximum(most, rows)]

    def rows(self) -> dict[str, float]:
        return {"fewest_rows": int(self._found[0]), "most_rows": int(self._found[1])}


def _reading(variant: LayerVariant, place: Place) -> dict[str, float]:
    if variant.scheduler is not None:
        variant.scheduler.get_stats()  # adds up timings, which are kept until there are many
    place.device.synchronize()
    time.sleep(_SETTLED_S)
    gc.collect()
    everything = gc.get_objects()
    process = psutil.Process()
    cuda = place.device.name == "cuda"
    return {
        "device_bytes": torch.cuda.memory_allocated() if cuda else 0,
        "resident_mib": 0.0 if cuda else process.memory_info().rss / 2**20,
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in everything),
        "objects": sum(str(type(one).__module__).startswith("fluid_npu.") for one in everything),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": process.num_threads(),
    }

"""What a step of whole layers under context parallelism costs the host and the device, on each rank.

For each kind of ``bench block``: milliseconds of the parts of an iteration, each waited for before the next begins, and
how long the host took to launch it; then, of one forward and backward in torch's profiler, the operations of the GPU
and the operators and calls of the host that took longest; and the lines at which torch waits for the device.
``scripts/gpu_attention.py`` is the command (part ``ops``). Nothing is compared here: ``bench block`` does that.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.bench.block_impls import KINDS, BlockVariant, unavailable
from fluid_npu.bench.forced_routing import ForcedRouting
from fluid_npu.bench.layer_ops import Operation, table
from fluid_npu.bench.workloads import Sizes
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import TORCH_DTYPES
from fluid_npu.train.parallel import Place

_WARM_UP, _TIMED = 3, 5
_SHOWN = 24
#: Calls in which the host waits for the device.
_WAITS = ("Synchronize", "cudaMemcpy ", "aten::_local_scalar_dense")


def measure(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The text of this rank's findings, and of the others. ``options``: impls, activation. Collective."""
    config = replace(config, device=place.device.name)
    lines: list[str] = []
    for name in options["impls"]:
        kind = KINDS[name]
        reason = unavailable(kind, config)
        if reason is not None:
            lines += [f"== {kind.name}: left out, {reason}", ""]
            continue
        variant = BlockVariant(kind, config, place, options["activation"])
        variant.force(_routing(config, place))
        lines += [f"== {kind.name}", *_Run(variant, place).findings(), ""]
        del variant
    every: list[Any] = [None] * place.world
    dist.all_gather_object(every, "\n".join(lines))
    return {"text": every[0], "others": every[1:]}


def _routing(config: TrainConfig, place: Place) -> ForcedRouting:
    preset = config.model()
    tokens = preset.seq_length // config.cp * preset.micro_batch_size
    sizes = Sizes(ranks=config.ep, experts=preset.experts, topk=preset.topk, tokens=tokens)
    device = place.device.torch_device(place.local_rank)
    return ForcedRouting("W0", sizes, place.rank % config.ep, config.seed, preset.layers, device)


class _Run:
    """One kind's layers on this rank's rows of a step."""

    def __init__(self, variant: BlockVariant, place: Place) -> None:
        self.variant, self.place = variant, place
        config = variant.config
        preset = config.model()
        shape = (preset.seq_length // config.cp, preset.micro_batch_size, preset.hidden)
        made: dict[str, Any] = {"dtype": TORCH_DTYPES[config.dtype or "fp32"]}
        made["device"] = place.device.torch_device(place.local_rank)
        self.x, self.dy = (torch.randn(shape, **made) for _ in range(2))

    def findings(self) -> list[str]:
        """All lines. Collective."""
        for _ in range(_WARM_UP):
            for part in self.parts().values():
                part()
        return [self.times(), *self.profiled(), *self.waits()]

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Of an iteration, in order."""
        made: list[torch.Tensor] = []
        return {
            "clear": self.variant.ddp.zero_grad_buffer,
            "forward": lambda: made.append(self.variant.forward(self.x.detach().requires_grad_())),
            "backward": lambda: made.pop().backward(self.dy),
            "reduce": self.variant.ddp.finish_grad_sync,
        }

    def times(self) -> str:
        """Median milliseconds of each part until the device is through, and until the host is."""
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(_TIMED):
            for name, part in self.parts().items():
                found.setdefault(name, []).append(self._ms(part))
        told = []
        for name, pairs in found.items():
            through, host = (median(column) for column in zip(*pairs, strict=True))
            told.append(f"{name} {through:.2f} (host {host:.2f})")
        return f"ms of each part of an iteration, waited for: {', '.join(told)}"

    def _ms(self, call: Callable[[], Any]) -> tuple[float, float]:
        self.place.device.synchronize()
        dist.barrier()
        self.place.device.synchronize()
        start = time.perf_counter()
        call()
        launched = time.perf_counter()
        self.place.device.synchronize()
        return (time.perf_counter() - start) * 1e3, (launched - start) * 1e3

    def waits(self) -> list[str]:
        """Which lines of one forward and backward make the host wait, as torch warns of them; on CUDA alone."""
        if self.place.device.name != "cuda":
            return []
        parts = self.parts()
        parts["clear"]()
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                parts["forward"]()
                parts["backward"]()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        lines = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found if "synchron" in str(one.message))
        told = ", ".join(f"{count} x {line}" for line, count in lines.most_common())
        return [f"  where torch waits for the device: {told or 'nowhere'}"]

    def profiled(self) -> list[str]:
        """Of one forward and backward."""
        from torch.profiler import ProfilerActivity, profile

        gpu = self.place.device.name == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        parts = self.parts()
        parts["clear"]()
        self.place.device.synchronize()
        dist.barrier()
        with profile(activities=activities) as recording:
            parts["forward"]()
            parts["backward"]()
            self.place.device.synchronize()
        events = list(recording.profiler.kineto_results.events())
        return [*_on_device(events), *_on_host(recording.key_averages())]


def _on_device(events: list[Any]) -> list[str]:
    """The operations of the GPU by time; nothing on a CPU."""
    found = [e for e in events if "CUDA" in str(e.device_type()) and not e.name().startswith("nccl:")]
    if not found:
        return []
    zero = min(e.start_ns() for e in found)
    made = [Operation(e.name(), (e.start_ns() - zero) / 1e3, (e.end_ns() - zero) / 1e3) for e in found]
    return table("forward and backward", made)[: _SHOWN + 1]


def _on_host(averages: Any) -> list[str]:
    """The operators and calls of the host by their own time, and those in which it waited."""
    rows = [(row.self_cpu_time_total, row.count, row.key) for row in averages]
    total, calls = sum(us for us, _, _ in rows), sum(count for _, count, name in rows if name.startswith("aten::"))
    lines = [f"host profiled: {calls} calls of operators, {total:.0f} us of the host's own with the profiler's"]
    lines += [f"  {count:4d} x {us:9.1f} us  {name[:100]}" for us, count, name in sorted(rows, reverse=True)[:_SHOWN]]
    waits = [f"{count} x {us:.0f} us {name}" for us, count, name in rows if any(word in name for word in _WAITS)]
    return [*lines, f"  waits for the device: {'; '.join(waits) or 'none'}"]

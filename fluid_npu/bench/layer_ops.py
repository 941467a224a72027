"""What one forward and backward of our MoE layer launches, on each rank: a table, an order, host time.

On CUDA, from torch's profiler: every kernel and copy with its count and time, when it ran, what waited for the host. On
any device: milliseconds of a step, and of a step whose tensors are so small that nothing but the host's work is left.
``scripts/gpu_layer_ops.py`` is the command.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.bench.forced_routing import ForcedRouting
from fluid_npu.bench.layer_floor import local_slices
from fluid_npu.bench.layer_impls import KINDS, LayerVariant
from fluid_npu.bench.layer_parts import union
from fluid_npu.bench.memory import held_mb, peak_memory_mb
from fluid_npu.bench.rig import MockData
from fluid_npu.bench.workloads import Sizes
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.parallel import Place

_WARM_UP, _TIMED = 8, 15
_WAITS = ("Synchronize", "cudaMemcpy ", "cudaStreamWaitValue")


@dataclass(frozen=True)
class Operation:
    """One thing the GPU did: microseconds from the step's first."""

    name: str
    start_us: float
    end_us: float
    stream: int = 0


def measure(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The text of this rank's findings. ``options``: impl, order, cprofile, floor, workload."""
    config = replace(config, device=place.device.name)
    run = _LayerRun(config, options, place)
    lines = [f"== {config.model().name} {dict(config.cut)}, EP {config.ep}, {options['impl']}, {options['workload']}"]
    lines += run.times("step")
    with run.floor():
        lines += run.times("floor (each AllToAll a local slice)")
    lines += run.memory()
    if place.device.name == "cuda":
        lines += run.profiled("step", options["order"])
        with run.floor():
            lines += run.profiled("floor", options["order"])
    if options["cprofile"]:
        lines += run.host_profile()
    every: list[Any] = [None] * place.world
    dist.all_gather_object(every, "\n".join(lines))
    return {"text": every[0], "others": every[1:]}


class _LayerRun:
    def __init__(self, config: TrainConfig, options: dict[str, Any], place: Place) -> None:
        preset, self.place = config.model(), place
        tokens = preset.seq_length * preset.micro_batch_size
        sizes = Sizes(ranks=config.ep, experts=preset.experts, topk=preset.topk, tokens=tokens)
        device = place.device.torch_device(place.local_rank)
        kind = KINDS[options["impl"]]
        self.variant = LayerVariant(kind, replace(config, impl=kind.impl), place, None)
        forced = ForcedRouting(options["workload"], sizes, place.rank % config.ep, config.seed, 1, device)
        if not options["router"]:
            forced.force(self.variant.model)
        self.x, self.dy = MockData(config, place).layer_input(0)

    def forward(self) -> torch.Tensor:
        y: torch.Tensor = self.variant.layer.mlp(self.x.detach().requires_grad_())[0]
        return y

    def step(self) -> None:
        with self.variant.mode():
            self.forward().backward(self.dy)

    def floor(self) -> AbstractContextManager[None]:
        """Inside, each AllToAll is a local slice; of a recorded layer, in a recording of its own."""
        return local_slices(self.variant.scheduler, self.variant.layer.mlp)

    def times(self, what: str) -> list[str]:
        """Each step alone, and steps of which the host launches the next before the last has ended."""
        synchronize = self.place.device.synchronize
        for _ in range(_WARM_UP):
            self.step()
        alone = sorted(self._ms(self.step) for _ in range(_TIMED))
        synchronize()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(_TIMED):
            self.step()
        launched = (time.perf_counter() - start) * 1e3 / _TIMED
        synchronize()
        behind = (time.perf_counter() - start) * 1e3 / _TIMED
        median = alone[len(alone) // 2]
        return [f"{what}: {median:.3f} ms alone ({alone[1]:.3f} to {alone[-2]:.3f}), {behind:.3f} ms one behind the "
                f"other, the host {launched:.3f} ms"]  # fmt: skip

    def _ms(self, call: Callable[[], Any]) -> float:
        self.place.device.synchronize()
        dist.barrier()
        start = time.perf_counter()
        call()
        self.place.device.synchronize()
        return (time.perf_counter() - start) * 1e3

    def memory(self) -> list[str]:
        """What a forward holds for its backward, and the peak of a step."""
        device = self.place.device
        held, peak = held_mb(device, self.forward), peak_memory_mb(device, self.step)
        return [f"activations held by the graph {held:.1f} MiB, peak of a step {peak:.1f} MiB above before"]

    def profiled(self, what: str, order: bool) -> list[str]:
        """Operations of the GPU in the last of three profiled steps, and calls in which the host waited."""
        from torch.profiler import ProfilerActivity, profile

        for _ in range(2):
            self.step()
        self.place.device.synchronize()
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recording:
            self.step()
            self.place.device.synchronize()
        events = list(recording.profiler.kineto_results.events())
        on_gpu = [e for e in events if "CUDA" in str(e.device_type()) and not e.name().startswith("nccl:")]
        if not on_gpu:
            return [f"{what}: the profiler saw nothing on the GPU"]
        zero = min(e.start_ns() for e in on_gpu)
        operations = [
            Operation(e.name(), (e.start_ns() - zero) / 1e3, (e.end_ns() - zero) / 1e3, e.device_resource_id())
            for e in on_gpu
        ]
        waits = [e for e in events if any(word in e.name() for word in _WAITS) and "CUDA" not in str(e.device_type())]
        operations.sort(key=lambda one: one.start_us)
        return [*table(what, operations), *_waits(waits, zero), *(in_order(operations) if order else [])]

    def host_profile(self) -> list[str]:
        """Python's own profile of 60 steps, backward on the same thread."""
        profiler = cProfile.Profile()
        single = getattr(torch.autograd, "set_multithreading_enabled", lambda _: nullcontext())
        with single(False):
            for _ in range(3):
                self.step()
            profiler.enable()
            for _ in range(60):
                self.step()
            profiler.disable()
        self.place.device.synchronize()
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(45)
        return ["Python's profile of 60 steps:", *(line[:160] for line in text.getvalue().splitlines() if line.strip())]


def table(what: str, operations: list[Operation]) -> list[str]:
    """Counts and times by name, the longest first, under a line with totals."""
    spans = [(one.start_us, one.end_us) for one in operations]
    window, busy = max(end for _, end in spans), union(spans)
    by_name: dict[str, list[float]] = defaultdict(list)
    for one in operations:
        by_name[one.name].append(one.end_us - one.start_us)
    copies = sum(len(times) for name, times in by_name.items() if name.startswith(("Memcpy", "Memset")))
    lines = [
        f"{what} profiled: {len(operations)} GPU operations ({copies} of them copies and fills), "
        f"window {window:.0f} us, busy {busy:.0f} us, idle {window - busy:.0f} us"
    ]
    ranked = sorted(by_name.items(), key=lambda entry: -sum(entry[1]))
    return lines + [f"  {len(times):3d} x {sum(times):9.1f} us  {name[:110]}" for name, times in ranked]


def in_order(operations: list[Operation]) -> list[str]:
    """One line for each operation: when it began, how long it took, how long the GPU had been idle, its stream."""
    lines, end = ["  in order: start us, time us, idle before us, stream"], 0.0
    for one in operations:
        idle = max(0.0, one.start_us - end)
        end = max(end, one.end_us)
        times = f"{one.start_us:9.1f} {one.end_us - one.start_us:8.1f} {idle:8.1f}"
        lines.append(f"  {times} {one.stream:4d}  {one.name[:90]}")
    return lines


def _waits(events: list[Any], zero: int) -> list[str]:
    found = [f"{e.name()} at {(e.start_ns() - zero) / 1e3:.0f} us for {e.duration_ns() / 1e3:.0f} us" for e in events]
    return [f"  the host waited {len(found)} times (the last is the end of the profile): {'; '.join(found[:20])}"]

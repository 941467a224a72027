"""``fluid-npu bench layer`` on its ranks: one transformer or MoE layer by every implementation, checked, then timed.

Forward, and forward with backward into fp32 main_grad, under one routing workload; each also with its AllToAlls
replaced by a local slice (the floor), and with marks for its parts, in the same interleaved rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from fluid_npu.bench.agreement import TOLERANCE, Disagreement, Worst, names_over_ranks, over_ranks, worst_error
from fluid_npu.bench.forced_routing import ForcedRouting
from fluid_npu.bench.layer_baseline import Baseline
from fluid_npu.bench.layer_floor import local_slices
from fluid_npu.bench.layer_impls import EXTRAS, KINDS, NEVER, ONCE_NODE, RECORDED, LayerVariant, unavailable
from fluid_npu.bench.layer_levers import lever_rows
from fluid_npu.bench.layer_parts import PARTS, Timeline, busy_parts, watched
from fluid_npu.bench.machine import describe_machine
from fluid_npu.bench.memory import held_mb, peak_memory_mb, recordings_mb
from fluid_npu.bench.result import envelope
from fluid_npu.bench.rig import STOCK, MockData
from fluid_npu.bench.rounds import run_rounds
from fluid_npu.bench.stats import Times, paired_ratio, percentiles, quiet_halves
from fluid_npu.bench.workloads import Sizes, tokens_of
from fluid_npu.comm.transports.nodes import nodes_of
from fluid_npu.device.choice import Choice
from fluid_npu.mcore.dispatch_choice import lacks_nodes
from fluid_npu.schedule.graphed import MOST_WARM_UP as CALLS_BEFORE_RECORDING
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.parallel import Place

_WARM_UP = 2
_PASSES = ("forward", "forward+backward")


def measure(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The result on this rank. ``options``: impls, part, workload, rounds, command, plant_error, node_size."""
    machine = describe_machine(place)
    # Resolved, so that what depends on the device decides by what is there.
    bench = Bench(replace(config, device=place.device.name), options, place)
    rows, levers = bench.rows(options["rounds"])
    facts = {"preset": config.model().name, "cut": dict(config.cut)}
    result = envelope("layer", config, options, place, machine, rows, **facts)
    left_out = {name: reason for name, reason in bench.left_out.items()}
    more = {"part": options["part"], "workload": options["workload"], "left_out": left_out}
    return {**result, **more, "levers": levers, "agreement": bench.agreement}


class Impl:
    """One implementation: runs the layer, and knows its parts."""

    def __init__(self, name: str, variant: LayerVariant, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.name, self.variant, self.forward = name, variant, forward
        self.scale = 1.0  # of its output's gradient; other than 1 only for a planted error
        self.timeline: Timeline | None = None

    def backward(self, y: torch.Tensor, dy: torch.Tensor) -> None:
        y.backward(dy * self.scale if self.scale != 1.0 else dy)


class Bench:
    """All implementations on the same weights, checked against stock SequentialMLP."""

    def __init__(self, config: TrainConfig, options: dict[str, Any], place: Place) -> None:
        self.config, self.place, self.whole = config, place, options["part"] == "transformer"
        self.left_out: dict[str, str] = {}
        self.node_size: int = options.get("node_size", 0)
        preset = config.model()
        tokens = preset.seq_length * preset.micro_batch_size
        sizes = Sizes(ranks=config.ep, experts=preset.experts, topk=preset.topk, tokens=tokens)
        rank, device = place.rank % config.ep, place.device.torch_device(place.local_rank)
        self.forced = ForcedRouting(options["workload"], sizes, rank, config.seed, 1, device)
        length = tokens_of(options["workload"], rank, sizes) // preset.micro_batch_size
        data = MockData(config, place, length)
        self.inputs = [data.layer_input(number) for number in range(4)]
        self.mask = data.batch(0)["attention_mask"]
        self.length = length
        stock = self._impl(STOCK, None)
        self.impls = [*self._baseline(stock, options), *self._megatron(stock, options)]
        self.left_out |= NEVER
        if options.get("plant_error"):
            ours = [impl for impl in self.impls if impl.variant.kind not in EXTRAS]
            ours[-1].scale = 1.0 + options["plant_error"]
        self.agreement = self._check(stock)

    # ---- building

    def _megatron(self, stock: Impl, options: dict[str, Any]) -> Iterator[Impl]:
        for name, kind in KINDS.items():
            if name not in options["impls"]:
                continue
            reason = unavailable(kind, self.config)
            if kind is ONCE_NODE and reason is None:
                reason = self._lacks_nodes()
            if kind in RECORDED and self.forced.period > 1:
                reason = f"workload {self.forced.name} changes its routing on the host; a recording repeats one"
            if reason is not None:
                self._leave_out(kind.name, reason)
            elif kind in EXTRAS:
                try:
                    yield self._impl(kind, stock.variant.weights())
                except Exception as error:  # other people's packages; the bench goes on without them and says so
                    self._leave_out(kind.name, f"cannot be built: {type(error).__name__}: {error}")
            else:
                yield stock if kind is STOCK else self._impl(kind, stock.variant.weights())

    def _lacks_nodes(self) -> str | None:
        """Why no token can be sent once per node, or None."""
        if not self.node_size:
            return "which ranks are a node is not known; give --a2a-node-size"
        ranks = dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group())
        return lacks_nodes(nodes_of(ranks, self.node_size)) or None

    def _baseline(self, stock: Impl, options: dict[str, Any]) -> Iterator[Impl]:
        preset = self.config.model()
        if "baseline" not in options["impls"]:
            return
        if self.whole and preset.mla is not None:
            self._leave_out("baseline", "it has no multi-latent attention; --part moe has no attention")
            return
        timeline = Timeline(self.place.device)
        layer = stock.variant.layer
        baseline = Baseline(
            layer,
            layer.config,
            whole=self.whole,
            rope=self._rope(stock.variant),
            routing=lambda: self.forced.maps[self.forced.step % self.forced.period][0],
            timer=timeline.part,
        )
        impl = Impl("baseline", stock.variant, baseline)
        impl.timeline = timeline
        yield impl

    def _impl(self, kind: Any, weights: dict[str, torch.Tensor] | None) -> Impl:
        size = self.node_size if kind is ONCE_NODE else self.config.a2a_node_size
        config = replace(self.config, impl=kind.impl, a2a_node_size=size)
        variant = LayerVariant(kind, config, self.place, weights)
        self.forced.force(variant.model)
        return Impl(kind.name, variant, self._forward(variant))

    def _forward(self, variant: LayerVariant) -> Callable[[torch.Tensor], torch.Tensor]:
        if not self.whole:
            return lambda x: variant.layer.mlp(x)[0]
        rope = self._rope(variant)
        return lambda x: variant.layer(hidden_states=x, attention_mask=self.mask, rotary_pos_emb=rope)[0]

    def _rope(self, variant: LayerVariant) -> torch.Tensor | None:
        embedding = getattr(variant.model, "rotary_pos_emb", None)
        if not self.whole or embedding is None or self.config.model().mla is not None:
            return None
        angles: torch.Tensor = embedding(self.length)
        return angles

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        if self.place.first:
            Choice("left out", reason).announce(name)

    # ---- checking

    def _check(self, stock: Impl) -> dict[str, Any]:
        """Output, input gradient and every weight gradient of each against stock. Raises Disagreement."""
        reference, found = self._results(stock), {}
        for impl in list(self.impls):
            if impl is stock:
                continue
            worst, reason = self._compared(impl, stock.name, reference)
            if worst is not None and not reason:
                found[impl.name] = {"error": worst.error, "where": worst.where}
                continue
            if impl.variant.kind not in EXTRAS:
                raise Disagreement(reason)
            self._leave_out(impl.name, reason)
            self.impls.remove(impl)
        return found

    def _compared(self, impl: Impl, name: str, reference: dict[str, torch.Tensor]) -> tuple[Worst | None, str]:
        """The worst error of all ranks, and why it cannot be timed; '' when it can. Collective."""
        own, failed = None, ""
        try:
            own = worst_error(self._results(impl), reference)
        except Exception as error:
            if impl.variant.kind not in EXTRAS:
                raise
            failed = f"cannot run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        failures = names_over_ranks([failed] if failed else [])
        if failures or own is None:
            return None, "; ".join(failures)
        worst, tolerance = over_ranks(own), TOLERANCE[self.config.dtype or "fp32"]
        if worst.error <= tolerance:
            return worst, ""
        reason = f"{impl.name} differs from {name}: relative error {worst.error:.2e} in {worst.where}"
        return worst, f"{reason}, allowed {tolerance:.0e}; a wrong result is not timed"

    def _results(self, impl: Impl) -> dict[str, torch.Tensor]:
        recorded = getattr(impl.variant.layer.mlp, "graphed", None) is not None
        calls = CALLS_BEFORE_RECORDING + 2 if recorded else 1  # of a layer that is replayed, what a replay gives
        for _ in range(calls):
            impl.variant.ddp.zero_grad_buffer()
            x, dy = self.inputs[0]
            x = x.detach().requires_grad_()
            y = impl.forward(x)
            impl.backward(y, dy)
        assert x.grad is not None
        gradients = {name: g.clone() for name, g in impl.variant.gradients().items() if ".layers." in name}
        return {"output": y.detach(), "input gradient": x.grad, **gradients}

    # ---- timing

    def rows(self, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """One row for each implementation and pass, and one for each lever and pass."""
        cells = [(impl, name) for impl in self.impls for name in _PASSES]
        memory = [self._memory(*cell) for cell in cells]
        parted = [Parted(self.place, impl, self._step(impl, name, False)) for impl, name in cells]
        steps = []
        for (impl, name), parts in zip(cells, parted, strict=True):
            steps += [self._step(impl, name, False), self._step(impl, name, True), parts.step]
        times = run_rounds(steps, rounds, _WARM_UP, self.place)
        rows = []
        for number, (impl, name) in enumerate(cells):
            first = next(i for i, cell in enumerate(cells) if cell[1] == name)
            row = self._row(impl, name, times, 3 * number, 3 * first)
            rows.append({**row, **memory[number], **parted[number].figures(row, rounds)})
        names = [(impl.name, name) for impl, name in cells]
        held = [one["activation_memory_mb"] for one in memory]
        own = [times[:, 3 * number] for number in range(len(cells))]
        return rows, lever_rows(dict(zip(names, own, strict=True)), dict(zip(names, held, strict=True)))

    def _step(self, impl: Impl, name: str, floor: bool) -> Callable[[int], Any]:
        def step(number: int) -> torch.Tensor:
            self.forced.step = number
            x, dy = self.inputs[number % len(self.inputs)]
            x = x.detach().requires_grad_()
            with local_slices(impl.variant.scheduler, impl.variant.layer.mlp) if floor else nothing():
                y = impl.forward(x)
                if name == "forward+backward":
                    impl.backward(y, dy)
            return y

        return step

    def _row(self, impl: Impl, name: str, times: Times, column: int, first: int) -> dict[str, Any]:
        own, floor = times[:, column], times[:, column + 1]
        ratio = paired_ratio(times[:, first], own)
        return {
            "impl": impl.name,
            "pass": name,
            **percentiles(own),
            **{f"floor{'' if key == 'median_ms' else '_' + key[:3]}_ms": ms for key, ms in percentiles(floor).items()},
            "ratio_baseline_over_this": ratio.value,
            "ratio_baseline_over_this_low": ratio.low,
            "ratio_baseline_over_this_high": ratio.high,
            "parted_ms": float(np.median(times[:, column + 2])),
            "rounds": len(times),
            "judged": quiet_halves(own) and quiet_halves(floor),
        }

    def _memory(self, impl: Impl, name: str) -> dict[str, float]:
        step = self._step(impl, name, False)
        step(0)
        held = held_mb(self.place.device, lambda: self._step(impl, "forward", False)(0))
        peak = peak_memory_mb(self.place.device, lambda: step(0))
        kept = recordings_mb(impl.variant.layer)
        most = torch.tensor([held + kept, peak + kept], device=self.place.device.torch_device(self.place.local_rank))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return {"activation_memory_mb": float(most[0]), "peak_memory_mb": float(most[1])}


class Parted:
    """Steps of one implementation and pass with marks at the borders of its parts, one in each round."""

    def __init__(self, place: Place, impl: Impl, step: Callable[[int], Any]) -> None:
        self.place, self.impl, self._step = place, impl, step
        self.timeline = impl.timeline or Timeline(place.device)
        self.found: list[dict[str, float]] = []

    def step(self, number: int) -> None:
        """One step; its parts are kept."""
        with self._watched():
            self.timeline.begin()
            self._step(number)
            self.found.append(self.timeline.end())

    def _watched(self) -> Any:
        variant = self.impl.variant
        return nothing() if self.impl.timeline else watched(self.timeline, variant.layer, variant)

    def _busy(self) -> dict[str, float] | None:
        try:
            return busy_parts(self.place.device, self.timeline, lambda: self._step(0))
        except RuntimeError as error:  # of the profiler
            print(f"{self.impl.name}: idle time is not told apart: {error}", file=sys.stderr, flush=True)
            return None

    def figures(self, row: dict[str, Any], rounds: int) -> dict[str, Any]:
        """Parts of the step, and whether they sum to it. Collective."""
        with self._watched():
            busy = self._busy()
        every: list[Any] = [None] * self.place.world
        dist.all_gather_object(every, (self.found[-rounds:], busy))
        steps, kernels = zip(*every, strict=True)
        parts = _marked(steps) if None in kernels else _kernel_time(kernels, row["median_ms"])
        total = sum(ms or 0.0 for ms in parts.values())
        near = abs(total - row["median_ms"]) <= 0.05 * row["median_ms"]
        agree = near or row["p10_ms"] <= total <= row["p90_ms"]
        return {"parts": parts, "parts_ms": total, "parts_agree": agree}


def _marked(steps: Sequence[Sequence[dict[str, float]]]) -> dict[str, float | None]:
    """From marks, [rank][round]: mean shares, over rounds, of the slowest rank's median step."""
    slowest = [max(ranks, key=lambda parts: sum(parts.values())) for ranks in zip(*steps, strict=True)]
    total = median(sum(parts.values()) for parts in slowest)
    shares = {p: fmean(one.get(p, 0.0) / sum(one.values()) for one in slowest) for p in PARTS if p != "idle"}
    return {**{part: share * total for part, share in shares.items()}, "idle": None}


def _kernel_time(ranks: Sequence[dict[str, float]], step_ms: float) -> dict[str, float | None]:
    """From each rank's kernels: means, of AllToAlls the shortest, since the others waited for a peer.

    Marks and the profiler cost time of the host, which is none of the step's: 'idle' is what kernels leave of the step
    without them, so launches, gaps and waits for a peer.
    """
    parts = {part: fmean(one.get(part, 0.0) for one in ranks) for part in PARTS if part != "idle"}
    parts["a2a"] = min(one.get("a2a", 0.0) for one in ranks)
    return {**parts, "idle": max(0.0, step_ms - sum(parts.values()))}


@contextmanager
def nothing() -> Iterator[None]:
    """No watching: the implementation marks its parts itself."""
    yield

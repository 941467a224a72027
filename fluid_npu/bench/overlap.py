"""``fluid-npu bench overlap`` on its ranks: forward and backward of a small model under each routing workload.

Gradients end in main_grad and are not reduced, since that is no AllToAll. Ours plain, overlapped, and as the
serialised twin run in interleaved rounds; the last two share one model, and clocks (``schedule.lanes``) are on every
AllToAll of both in every round, so that the figures of one AllToAll and the time of the step come from the same
steps. The words are those of ``schedule.definitions``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.bench.agreement import TOLERANCE, check_agreement
from fluid_npu.bench.forced_routing import ForcedRouting
from fluid_npu.bench.machine import describe_machine
from fluid_npu.bench.memory import peak_memory_mb
from fluid_npu.bench.overlap_figures import alone_ms, rows_of_exchanges, step_row
from fluid_npu.bench.plant import plant_error
from fluid_npu.bench.result import envelope
from fluid_npu.bench.rig import OVERLAPPED, PLAIN, STOCK, MockData, Variant, build_variants, fuse_weight_gradients
from fluid_npu.bench.rounds import run_rounds
from fluid_npu.bench.stats import Times
from fluid_npu.bench.workload_names import DESCRIPTIONS
from fluid_npu.bench.workloads import Sizes, received, tokens_of
from fluid_npu.comm.legs import LEG_COUNTERS
from fluid_npu.schedule.definitions import Exchange
from fluid_npu.schedule.lanes import Lanes
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import moe_layers, shared_experts
from fluid_npu.train.parallel import Place

_WARM_UP = 2


def measure(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The result on this rank. ``options``: workloads, rounds, command, plant_error."""
    machine = describe_machine(place)
    bench = Bench(config, place, options.get("plant_error", 0.0))
    rows: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    lanes: list[dict[str, Any]] = []
    for name in options["workloads"]:
        if place.first:
            print(f"{name} {DESCRIPTIONS[name]}", file=sys.stderr, flush=True)
        run = bench.run(name, options["rounds"])
        own_rows = rows_of_exchanges(name, run.twin, run.overlapped, run.alone_ms)
        rows += own_rows
        steps.append({**step_row(name, run.times, run.twin, own_rows, config.overlap), **run.facts})
        lanes += run.lanes
    result = envelope("overlap", config, options, place, machine, rows, steps=steps, lanes=lanes)
    judged = all(row["judged"] for row in steps)
    more = {"preset": config.model().name, "cut": dict(config.cut), "carry_over": config.carry_over}
    more |= {"dispatch": config.dispatch, "overlap": config.overlap, "moe_chunks": config.moe_chunks}
    more["a2a_transport"] = config.a2a_transport
    return {**result, **more, "agreement": bench.agreement, "judged": judged}


@dataclasses.dataclass
class Run:
    """One workload's measurements, equal on all ranks; exchanges are [round][rank][number]."""

    times: Times  # [rounds, (plain, twin, overlapped)]
    twin: list[list[list[Exchange]]]
    overlapped: list[list[list[Exchange]]]
    alone_ms: list[float]
    facts: dict[str, Any]
    lanes: list[dict[str, Any]]


class Bench:
    """The variants, checked against stock under an uneven workload."""

    def __init__(self, config: TrainConfig, place: Place, error: float = 0.0) -> None:
        self.config, self.place = config, place
        preset = config.model()
        tokens = preset.seq_length * preset.micro_batch_size
        self.sizes = Sizes(ranks=config.ep, experts=preset.experts, topk=preset.topk, tokens=tokens)
        ours = dataclasses.replace(OVERLAPPED, overlap="full") if config.overlap == "full" else OVERLAPPED
        stock, self.plain, self.overlapped = build_variants(
            (STOCK, PLAIN, ours), config, place, optimizer="none", reduce=False
        )
        for variant in (self.plain, self.overlapped):
            fuse_weight_gradients(variant)
        self.twin = self.overlapped.as_twin()
        self.layers = sum(1 for _ in moe_layers(self.plain.model))
        if error:
            plant_error(self.plain, error)
        forced, batch = self._forced("W2", (stock, self.plain, self.overlapped))
        variants = (stock, self.plain, self.overlapped, self.twin)
        worst = check_agreement(variants, batch(0), TOLERANCE[config.dtype or "fp32"])
        self.agreement = {name: {"error": w.error, "where": w.where} for name, w in worst.items()}

    def run(self, name: str, rounds: int) -> Run:
        """Everything about one workload. Collective."""
        forced, batch = self._forced(name, (self.plain, self.overlapped))
        rounds = -(-rounds // forced.period) * forced.period
        scheduler = self.overlapped.scheduler
        assert scheduler is not None
        shared = shared_experts([self.overlapped.model])
        spans: dict[str, list[dict[str, Any]]] = {}

        def stepped(variant: Variant, lanes: Lanes | None) -> Callable[[int], Any]:
            def step(number: int) -> None:
                forced.step = number
                if lanes is None:
                    variant.forward_backward(batch(number))
                    return
                with lanes:
                    variant.forward_backward(batch(number))

            return step

        clocks = [Lanes(scheduler, self.place.device, shared) for _ in range(2)]
        steps = [stepped(self.plain, None), stepped(self.twin, clocks[0]), stepped(self.overlapped, clocks[1])]
        times = run_rounds(steps, rounds, _WARM_UP, self.place)
        for kind, lanes in zip(("twin", "overlapped"), clocks, strict=True):
            spans[kind] = [{"kind": kind, "rank": self.place.rank, **vars(span)} for span in lanes.spans()]
        twin, overlapped = (
            [list(step) for step in zip(*self._every_rank(lanes.take_steps()[-rounds:]), strict=True)]
            for lanes in clocks
        )
        alone = alone_ms(clocks[0].cargo(), scheduler.transport, self.place)
        peaks = [self._peak(lambda step=step: step(0)) for step in (steps[0], steps[2])]
        everyone = self._every_rank([*spans["twin"], *spans["overlapped"]])
        sent = self._bytes(lambda: steps[2](0))
        return Run(
            times=times,
            twin=twin,
            overlapped=overlapped,
            alone_ms=alone,
            facts={
                "description": DESCRIPTIONS[name],
                "tokens_per_rank": self._tokens(name),
                "peak_memory_mb": peaks[1],
                "extra_peak_memory_mb": peaks[1] - peaks[0],
                "rounds": rounds,
                **sent,
            },
            lanes=[{"workload": name, **span} for rank in everyone for span in rank],
        )

    def _forced(self, name: str, variants: Sequence[Variant]) -> tuple[ForcedRouting, Callable[[int], Any]]:
        """The workload on these models, and its batches."""
        place, sizes = self.place, self.sizes
        index = place.rank % sizes.ranks
        device = place.device.torch_device(place.local_rank)
        forced = ForcedRouting(name, sizes, index, self.config.seed, self.layers, device)
        for variant in variants:
            forced.force(variant.model)
        micro_batch = self.config.model().micro_batch_size
        data = MockData(self.config, place, tokens_of(name, index, sizes) // micro_batch)
        batches = [data.batch(number) for number in range(4)]
        return forced, lambda number: batches[number % len(batches)]

    def _tokens(self, name: str) -> list[int]:
        """Rows that each rank receives in step 0."""
        rows, local = received(name, 0, self.sizes), self.sizes.local
        return [sum(rows[rank * local : (rank + 1) * local]) for rank in range(self.sizes.ranks)]

    def _peak(self, call: Callable[[], Any]) -> float:
        peak = peak_memory_mb(self.place.device, call)
        most = torch.tensor([peak], device=self.place.device.torch_device(self.place.local_rank))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most)

    def _bytes(self, call: Callable[[], Any]) -> dict[str, float]:
        """Bytes that a rank sends to others in a step, what a row for every (token, expert) would be, and those of two
        legs where there are two: means."""
        scheduler = self.overlapped.scheduler
        assert scheduler is not None
        scheduler.reset_stats()
        call()
        stats = scheduler.get_stats()
        every = self._every_rank(stats)
        names = ("a2a_bytes", "a2a_plain_bytes", *(name for name in LEG_COUNTERS if any(name in one for one in every)))
        return {name: fmean(one.get(name, 0.0) for one in every) for name in names}

    def _every_rank(self, mine: Any) -> list[Any]:
        every: list[Any] = [None] * self.place.world
        dist.all_gather_object(every, mine)
        return every

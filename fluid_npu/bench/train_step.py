"""``fluid-npu bench train-step`` on its ranks: check, then paired rounds of a whole step and of one MoE layer alone.

A row: ``case``, ``impl``, ``median_ms``, ``p10_ms``, ``p90_ms`` (of the slowest rank), ``peak_memory_mb`` (of the
rank that needs most, above what lives between steps), and
* ``a2a_ms``: transfer of all AllToAlls of the step by themselves (``probe``); overlapped: that of its twin.
* ``hidden_ms``, ``hidden_spread_ms``, ``hidden_fraction``, ``coverable_ms``: as in ``schedule.definitions``; 0 and
  null without overlap.
* ``ratio_stock_over_this`` with ``_low`` and ``_high``, its 95 % interval: median of the per-round ratios
  (``stats``); above 1.0 this is faster. null with a planted delay, which stock does not have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.bench.agreement import TOLERANCE, Disagreement, check_agreement, over_ranks, worst_error
from fluid_npu.bench.machine import describe_machine
from fluid_npu.bench.memory import peak_memory_mb
from fluid_npu.bench.plant import plant_error
from fluid_npu.bench.probe import probe_fluid, probe_stock
from fluid_npu.bench.result import envelope
from fluid_npu.bench.rig import KINDS, LayerAlone, MockData, Variant, build_variants
from fluid_npu.bench.rounds import run_rounds
from fluid_npu.bench.stats import Times, difference_of_medians, paired_ratio, percentiles, quiet_halves
from fluid_npu.schedule.definitions import Coverage, hidden_fraction
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import shared_experts
from fluid_npu.train.parallel import Place

#: Case to preset, rounds and warm-up rounds.
CASES = {"h64": ("h64", 60, 5), "h256": ("mixtral-tiny", 20, 2)}
LAYER = "MoE layer alone"
_PROBED = 5


def measure(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The result on this rank. ``options``: cases, rounds (None: the case's own), command, plant_error."""
    machine = describe_machine(place)
    rows: list[dict[str, Any]] = []
    agreement = {}
    for case in options["cases"]:
        preset, rounds, warm_up = CASES[case]
        rounds = options["rounds"] or rounds
        bench = Case(case, replace(config, preset=preset), place, options)
        agreement[case] = bench.agreement
        # The layer first: it leaves the weights alone, so all variants still route alike.
        layer, step = (
            _announced(part, place).rows(rounds, min(warm_up, rounds))
            for part in (bench.layer_alone(), bench.whole_step())
        )
        rows += [*step, *layer]
    return envelope("train-step", config, options, place, machine, rows, agreement=agreement)


class Case:
    """The variants of one case, checked."""

    def __init__(self, name: str, config: TrainConfig, place: Place, options: dict[str, Any]) -> None:
        self.name, self.config, self.place = name, config, place
        self.data = MockData(config, place)
        self.variants = build_variants(KINDS, config, place)
        if options.get("plant_error"):
            plant_error(self.variants[1], options["plant_error"])
        tolerance = TOLERANCE[config.dtype or "fp32"]
        worst = check_agreement(self.variants, self.data.batch(0), tolerance)
        self.layers = [LayerAlone(variant) for variant in self.variants]
        _check_layers(self.layers, self.data, tolerance)
        self.agreement = {variant: {"error": w.error, "where": w.where} for variant, w in worst.items()}

    def whole_step(self) -> _Timed:
        """The training step."""
        batches = [self.data.batch(number) for number in range(4)]
        steps = [lambda n, v=v: v.step(batches[n % len(batches)]) for v in self.variants]
        return _Timed(self.name, self.variants, steps, self.config, self.place)

    def layer_alone(self) -> _Timed:
        """Forward and backward of one MoE layer."""
        inputs = [self.data.layer_input(number) for number in range(4)]
        steps = [lambda n, layer=layer: layer.step(*inputs[n % len(inputs)]) for layer in self.layers]
        return _Timed(f"{self.name} {LAYER}", self.variants, steps, self.config, self.place)


class _Timed:
    """One callable per variant, and the rows that come of them."""

    def __init__(
        self,
        title: str,
        variants: Sequence[Variant],
        steps: Sequence[Callable[[int], Any]],
        config: TrainConfig,
        place: Place,
    ) -> None:
        self.title, self.variants, self.steps, self.config, self.place = title, variants, steps, config, place

    def rows(self, rounds: int, warm_up: int) -> list[dict[str, Any]]:
        """Memory first, while all variants still have the same weights and routing; then times, then AllToAlls."""
        for step in self.steps:
            step(0)  # the optimizer makes its states in its first step
        peaks = [self._peak(step) for step in self.steps]
        times = run_rounds(self.steps, rounds, warm_up, self.place)
        exposures = [self._exposure(index) for index in range(len(self.steps))]
        exposures[2] = exposures[3]  # beside dW the duration of a transfer cannot be observed
        rows = []
        for index, variant in enumerate(self.variants):
            rows.append(
                {
                    "case": self.title,
                    "impl": variant.name,
                    **percentiles(times[:, index]),
                    "peak_memory_mb": peaks[index],
                    "a2a_ms": exposures[index].transfer_ms,
                    **hidden(times, index, exposures[3]),
                    **self._ratio(times, index),
                    "rounds": rounds,
                    "judged": quiet_halves(times[:, index]),
                }
            )
        return rows

    def _peak(self, step: Callable[[int], Any]) -> float:
        peak = peak_memory_mb(self.place.device, lambda: step(0))
        most = torch.tensor([peak], device=self.place.device.torch_device(self.place.local_rank))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most)

    def _exposure(self, index: int) -> Coverage:
        variant, step = self.variants[index], self.steps[index]
        if variant.scheduler is None:
            return probe_stock(lambda: step(0), self.place, _PROBED)
        if not variant.kind.twin and variant.kind.overlap != "off":
            return Coverage()
        return probe_fluid(variant.scheduler, lambda: step(0), self.place, _PROBED, shared_experts([variant.model]))

    def _ratio(self, times: Times, index: int) -> dict[str, float | None]:
        names = ("ratio_stock_over_this", "ratio_stock_over_this_low", "ratio_stock_over_this_high")
        if self.config.plant_delay_ms:
            return dict.fromkeys(names)
        ratio = paired_ratio(times[:, 0], times[:, index])
        return dict(zip(names, (ratio.value, ratio.low, ratio.high), strict=True))


def _announced(part: _Timed, place: Place) -> _Timed:
    if place.first:
        print(f"{part.title}: {part.config.preset}, {len(part.steps)} variants", file=sys.stderr, flush=True)
    return part


def hidden(times: Times, index: int, twin: Coverage) -> dict[str, float | None]:
    """``hidden_ms``, its spread and fraction for column ``index``: stock, plain, overlapped, twin."""
    if index != 2:
        return {"hidden_ms": 0.0, "hidden_spread_ms": None, "hidden_fraction": None, "coverable_ms": None}
    gain = difference_of_medians(times[:, 3], times[:, 2])
    return {
        "hidden_ms": gain.value,
        "hidden_spread_ms": gain.spread,
        "hidden_fraction": hidden_fraction(gain.value, gain.spread, twin),
        "coverable_ms": twin.coverable_ms,
    }


def _check_layers(layers: Sequence[LayerAlone], data: MockData, tolerance: float) -> None:
    """Output and input gradient of the layer alone against stock's. Raises Disagreement."""
    results = [
        dict(zip(("output", "input gradient"), layer.step(*data.layer_input(0)), strict=True)) for layer in layers
    ]
    for layer, result in zip(layers[1:], results[1:], strict=True):
        worst = over_ranks(worst_error(result, results[0]))
        if worst.error > tolerance:
            raise Disagreement(
                f"{layer.name} differs from {layers[0].name} in the MoE layer's {worst.where}: relative error "
                f"{worst.error:.2e}, allowed {tolerance:.0e}; a wrong result is not timed"
            )

"""``fluid-npu parity`` on its ranks: some SGD steps of every variant from the same weights and data, compared.

Stock is the reference for losses, every gradient after every step, and every weight at the end. The overlapped form
must be bitwise equal to its serialised twin. Figures are relative Frobenius errors, the worst of all ranks and steps.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fluid_npu.bench.agreement import (
    TOLERANCE,
    Gradients,
    Worst,
    different_bits,
    gradients_of,
    loss_error,
    names_over_ranks,
    over_ranks,
    worst_error,
)
from fluid_npu.bench.machine import describe_machine, describe_versions
from fluid_npu.bench.plant import plant_error
from fluid_npu.bench.rig import KINDS, OVERLAPPED, MockData, Variant, build_variants
from fluid_npu.bench.routing import Routing, RoutingRecord, compare_routing
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.parallel import Place


class _Comparison:
    """One variant against stock, over all steps."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.routing = RoutingRecord(variant.model)
        self.loss, self.gradient, self.weight = Worst(), Worst(), Worst()
        self.tokens_rerouted, self.reroute_margin = 0, 0.0
        self.bits: list[str] = []
        self.latest: Gradients | None = None
        self.routed: list[Routing] = []

    def step(self, batch: Any) -> None:
        """Computes; the optimizer steps after the comparison."""
        self.latest = gradients_of(self.variant, batch)
        self.routed = self.routing.take()

    def compare(self, stock: _Comparison, number: int) -> None:
        """Takes this step's differences from stock."""
        assert self.latest is not None and stock.latest is not None
        gradient = worst_error(self.latest.by_name, stock.latest.by_name)
        self.gradient = max(self.gradient, Worst(gradient.error, f"{gradient.where}, step {number}"))
        loss = loss_error(self.latest.loss, stock.latest.loss)
        self.loss = max(self.loss, Worst(loss.error, f"step {number}"))
        tokens, margin = compare_routing(self.routed, stock.routed)
        self.tokens_rerouted += tokens
        self.reroute_margin = max(self.reroute_margin, margin)

    def compare_bits(self, other: _Comparison) -> None:
        """Notes what is not bitwise equal to ``other`` in this step."""
        assert self.latest is not None and other.latest is not None
        self.bits += different_bits(self.latest.by_name, other.latest.by_name)
        if self.latest.loss != other.latest.loss:
            self.bits.append("the loss")

    def row(self, tolerance: float) -> dict[str, Any]:
        """The result over all ranks. Collective."""
        loss, gradient, weight = (over_ranks(worst) for worst in (self.loss, self.gradient, self.weight))
        bits = names_over_ranks(self.bits)
        rerouted = [None] * dist.get_world_size()
        dist.all_gather_object(rerouted, (self.tokens_rerouted, self.reroute_margin))
        tokens = sum(pair[0] for pair in rerouted)  # type: ignore[index]
        worst = max(loss.error, gradient.error, weight.error)
        return {
            "impl": self.variant.name,
            "loss_error": loss.error,
            "gradient_error": gradient.error,
            "gradient_where": gradient.where,
            "weight_error": weight.error,
            "weight_where": weight.where,
            "tokens_rerouted": tokens,
            "reroute_margin": max(pair[1] for pair in rerouted),  # type: ignore[index]
            "twin_equal": not bits if self.variant.kind is OVERLAPPED else None,
            "twin_differs_in": bits[:8],
            "passed": worst <= tolerance and not tokens and not bits,
        }


def compare_variants(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The result on this rank. ``options``: command, plant_error."""
    machine = describe_machine(place)
    tolerance = TOLERANCE[config.dtype or "fp32"]
    variants = build_variants(KINDS, config, place, optimizer="sgd")
    if options.get("plant_error"):
        plant_error(variants[1], options["plant_error"])
    stock, plain, overlapped, twin = (_Comparison(variant) for variant in variants)
    data = MockData(config, place)
    for number in range(1, config.steps + 1):
        batch = data.batch(number)
        for one in (stock, plain, overlapped, twin):
            one.step(batch)
        for one in (plain, overlapped):
            one.compare(stock, number)
        overlapped.compare_bits(twin)
        for one in (stock, plain, overlapped, twin):
            one.variant.update()
    for one in (plain, overlapped):
        one.weight = worst_error(one.variant.weights(), stock.variant.weights())
    overlapped.bits += different_bits(overlapped.variant.weights(), twin.variant.weights())
    rows = [one.row(tolerance) for one in (plain, overlapped)]
    return {
        "command": options["command"],
        "machine": machine,
        "versions": describe_versions(),
        "preset": config.model().name,
        "cut": dict(config.cut),
        "dtype": config.dtype or "fp32",
        "steps": config.steps,
        "ep": config.ep,
        "tolerance": tolerance,
        "passed": all(row["passed"] for row in rows),
        "rows": rows,
    }

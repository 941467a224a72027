"""``bench ffn-sweep`` and ``bench parallel-sweep`` on their ranks: a loop over experts against grouped matmuls.

Each point is what one rank computes: forward and backward of its experts into fp32 main_grad, by Megatron's
SequentialMLP (one MLP per expert) and by FluidGroupedMLP, from the same weights, rows and probabilities. AllToAlls are
left out. All ranks compute the same sizes; the slowest counts. R rows, H hidden, L local experts.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fluid_npu.bench.agreement import TOLERANCE, Disagreement, Worst, over_ranks, worst_error
from fluid_npu.bench.machine import describe_machine
from fluid_npu.bench.published import FFN, PARALLEL, Published
from fluid_npu.bench.result import envelope
from fluid_npu.bench.rig import PLAIN, STOCK, Variant, build_variants, fuse_weight_gradients
from fluid_npu.bench.rounds import run_rounds
from fluid_npu.bench.stats import paired_ratio, percentiles, quiet_halves
from fluid_npu.bench.sweep_shapes import Shape, ffn_shape, parallel_shape
from fluid_npu.bench.sweeps_text import advice
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import TORCH_DTYPES, moe_layers
from fluid_npu.train.parallel import Place

_WARM_UP = 3


def measure_ffn(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The result on this rank. ``options``: ffn, rounds, command, plant_error."""
    small = place.device.name == "cpu"
    points = [("ffn", ffn, ffn_shape(ffn, small=small), FFN.get(ffn)) for ffn in sorted(options["ffn"])]
    return _measure("ffn-sweep", points, config, options, place)


def measure_parallel(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The result on this rank. ``options``: config, rounds, command, plant_error."""
    small = place.device.name == "cpu"
    points = [("config", name, parallel_shape(name, small=small), PARALLEL.get(name)) for name in options["config"]]
    return _measure("parallel-sweep", points, config, options, place)


Point = tuple[str, Any, Shape, Published | None]


def _measure(
    bench: str, points: list[Point], config: TrainConfig, options: dict[str, Any], place: Place
) -> dict[str, Any]:
    machine = describe_machine(place)
    rows, worst = [], Worst()
    for key, value, shape, published in points:
        if place.first:
            print(f"{key} {value}: {shape}", file=sys.stderr, flush=True)
        pair = Pair(shape, config, place, options.get("plant_error", 0.0))
        worst = max(worst, pair.worst)
        known = None if published is None else published.as_dict()
        rows.append({key: value, "shape": shape.as_dict(), **pair.figures(options["rounds"]), "published": known})
        del pair
        _release(place)
    result = envelope(bench, config, options, place, machine, rows)
    loses = next((row[points[0][0]] for row in rows if row["judged"] and row["gain_high"] < 0), None)
    agreement = {"grouped": {"error": worst.error, "where": worst.where}}
    small = place.device.name == "cpu"
    result |= {"scaled_down": small, "loses_from": loses, "agreement": agreement}
    return {**result, "advice": advice(result)}


class Pair:
    """Both forms of one point's experts, checked to agree. Raises Disagreement."""

    def __init__(self, shape: Shape, config: TrainConfig, place: Place, error: float = 0.0) -> None:
        self.place = place
        variants = build_variants((STOCK, PLAIN), _model(shape, config), place, optimizer="none")
        fuse_weight_gradients(variants[1])
        device, dtype = place.device.torch_device(place.local_rank), TORCH_DTYPES[config.dtype or "fp32"]
        draw = torch.Generator().manual_seed(config.seed + place.rank)
        counts = torch.full((shape.local_experts,), shape.rows // shape.local_experts, dtype=torch.int64)
        rows = int(counts.sum())
        x, dy = (torch.randn(rows, shape.hidden, generator=draw).to(device, dtype) for _ in range(2))
        # Small inputs keep low-precision gradients finite; probabilities as a router's.
        probs = (0.25 + 0.5 * torch.rand(rows, generator=draw)).to(device)
        self.steps = [_step(variant, x, dy, probs, counts) for variant in variants]
        if error:
            self.steps[1] = _broken(self.steps[1], error)
        self.worst = _check(variants, self.steps, TOLERANCE[config.dtype or "fp32"])

    def figures(self, rounds: int) -> dict[str, Any]:
        """Times and gain of a row."""
        steps = [lambda _, step=step: step() for step in self.steps]
        times = run_rounds(steps, rounds, _WARM_UP, self.place)
        row: dict[str, Any] = {}
        for column, name in enumerate(("baseline", "grouped")):
            found = percentiles(times[:, column])
            row |= {
                f"{name}_ms": found["median_ms"],
                f"{name}_p10_ms": found["p10_ms"],
                f"{name}_p90_ms": found["p90_ms"],
            }
        ratio = paired_ratio(times[:, 0], times[:, 1])
        gain = {"gain": ratio.value - 1.0, "gain_low": ratio.low - 1.0, "gain_high": ratio.high - 1.0}
        return {**row, **gain, "rounds": rounds, "judged": all(quiet_halves(times[:, column]) for column in range(2))}


def _release(place: Place) -> None:
    """Gives the memory of one point back before the next is built."""
    gc.collect()
    if place.device.name != "cpu":
        getattr(torch, place.device.name).empty_cache()


def _model(shape: Shape, config: TrainConfig) -> TrainConfig:
    """A model of one layer that holds such experts."""
    heads = shape.hidden // 64 if shape.hidden % 64 == 0 else 1
    cut = {
        **{"layers": 1, "hidden": shape.hidden, "ffn": shape.ffn, "moe_ffn": shape.ffn, "heads": heads},
        **{"kv_heads": heads, "experts": shape.local_experts, "topk": 2, "vocab_size": 128, "seq_length": 32},
    }
    return replace(config, preset="mixtral-8x7b", cut=cut, ep=1)


def _step(
    variant: Variant, x: torch.Tensor, dy: torch.Tensor, probs: torch.Tensor, counts: torch.Tensor
) -> Callable[[], dict[str, torch.Tensor]]:
    experts: Any = next(iter(moe_layers(variant.model))).experts

    def step() -> dict[str, torch.Tensor]:
        x_RH, p_R = x.detach().requires_grad_(), probs.detach().requires_grad_()
        y_RH, _ = experts(x_RH, counts, p_R)
        y_RH.backward(dy)
        assert x_RH.grad is not None and p_R.grad is not None
        return {"output": y_RH.detach(), "input gradient": x_RH.grad, "probability gradient": p_R.grad}

    return step


def _broken(step: Callable[[], dict[str, torch.Tensor]], error: float) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: value * (1.0 + error) for name, value in step().items()}


def _check(variants: list[Variant], steps: list[Callable[[], dict[str, torch.Tensor]]], tolerance: float) -> Worst:
    """Outputs, input and weight gradients of both forms. Collective; raises Disagreement on all ranks alike."""
    results = []
    for variant, step in zip(variants, steps, strict=True):
        variant.ddp.zero_grad_buffer()
        result = step()
        gradients = {name: grad.clone() for name, grad in variant.gradients().items() if ".experts." in name}
        results.append({**result, **gradients})
    worst = over_ranks(worst_error(results[1], results[0]))
    if worst.error > tolerance:
        raise Disagreement(
            f"grouped experts differ from the loop over experts: relative error {worst.error:.2e} in {worst.where}, "
            f"allowed {tolerance:.0e}; a wrong result is not timed"
        )
    return worst

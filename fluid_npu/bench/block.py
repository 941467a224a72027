"""``fluid-npu bench block`` on its ranks: whole transformer layers under context parallelism, checked, then timed.

Forward with backward into fp32 main_grad; the iteration, which also clears the gradients before and reduces them after;
forward alone. Then each AllToAll of the overlapped forms beside its serialised twin, with clocks (``schedule.lanes``).
What is there already is written to a file after each of these, so that a run that is cut off leaves something.

S rows of a sequence, B batch, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.bench.agreement import TOLERANCE, Disagreement, different_bits, names_over_ranks, over_ranks, worst_error
from fluid_npu.bench.block_impls import EXTRAS, KINDS, STOCK_TE, WHOLE, BlockVariant, layers_of, unavailable
from fluid_npu.bench.forced_routing import ForcedRouting
from fluid_npu.bench.machine import describe_machine
from fluid_npu.bench.overlap_figures import alone_ms, rows_of_exchanges
from fluid_npu.bench.result import envelope
from fluid_npu.bench.rig import Kind
from fluid_npu.bench.rounds import run_rounds
from fluid_npu.bench.stats import Times, difference_of_medians, paired_ratio, percentiles, quiet_halves
from fluid_npu.bench.workloads import Sizes
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.torch_attention import repeatable_attention
from fluid_npu.schedule.graphed import MOST_WARM_UP as CALLS_BEFORE_RECORDING
from fluid_npu.schedule.lanes import Lanes
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.model import TORCH_DTYPES, shared_experts
from fluid_npu.train.parallel import Place

_WARM_UP = 2
_PASSES = ("forward+backward", "iteration", "forward")


def measure(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The result on this rank. ``options``: impls, activation, rounds, partial, command, link, plant_error."""
    bench = Bench(replace(config, device=place.device.name), options, place)
    machine = describe_machine(place)
    result: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    exchanges: list[dict[str, Any]] = []
    twins: list[dict[str, Any]] = []
    stages: list[Callable[[], None]] = [lambda name=name: rows.extend(bench.rows(name)) for name in _PASSES]
    stages.append(lambda: bench.add_exchanges(exchanges, twins))
    for number, stage in enumerate(stages):
        stage()
        facts = {"preset": config.model().name, "cut": dict(config.cut), "cp": config.cp, "ep": config.ep}
        more = {"exchanges": exchanges, "twins": twins, "activation": options["activation"], **bench.found}
        result = envelope("block", config, options, place, machine, rows, **facts, **more)
        result["complete"] = number == len(stages) - 1
        if place.first and options.get("partial"):
            Path(options["partial"]).write_text(json.dumps(result), encoding="utf-8")
    return result


class Bench:
    """All variants, checked against the first of them, or against stock on whole sequences."""

    def __init__(self, config: TrainConfig, options: dict[str, Any], place: Place) -> None:
        self.config, self.options, self.place = config, options, place
        self.left_out: dict[str, str] = {}
        preset = config.model()
        tokens = preset.seq_length // config.cp * preset.micro_batch_size
        sizes = Sizes(ranks=config.ep, experts=preset.experts, topk=preset.topk, tokens=tokens)
        device = place.device.torch_device(place.local_rank)
        self.forced = ForcedRouting("W0", sizes, place.rank % config.ep, config.seed, preset.layers, device)
        self.inputs = [self._sample(number) for number in range(2)]
        asked = [kind for name, kind in KINDS.items() if name in options["impls"]]
        stock = [made for kind in asked if kind in STOCK_TE and (made := self._made(kind)) is not None]
        reference, want = self._reference(stock)
        ours = [made for kind in asked if kind not in STOCK_TE and (made := self._made(kind)) is not None]
        others = [one for one in (*stock, *ours) if one is not reference and one.name not in self.left_out]
        for variant in others:
            variant.load(reference.weights())
        self.found: dict[str, Any] = {"left_out": self.left_out, "reference": reference.name}
        self.found["agreement"] = self._check(others, reference.name, want)
        timed = others if reference.whole else [reference, *others]  # whole sequences are no context parallelism
        self.variants = [one for one in timed if one.name not in self.left_out]
        if not self.variants:
            raise Disagreement(f"bench block: nothing to time: {self.left_out}")

    def _sample(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole sequences and the gradient of their output ``[S, B, H]``, the same on ranks that share them."""
        preset = self.config.model()
        device = self.place.device.torch_device(self.place.local_rank)
        seed = (self.config.seed * 1_000_003 + number) * 4096 + self.place.dp_rank
        on_host = self.place.device.name != "cuda"
        generator = torch.Generator("cpu" if on_host else device).manual_seed(seed)
        shape = (preset.seq_length, preset.micro_batch_size, preset.hidden)
        dtype = TORCH_DTYPES[self.config.dtype or "fp32"]
        x, dy = (torch.randn(shape, generator=generator, device=generator.device).to(device, dtype) for _ in range(2))
        return x, dy

    # ---- building and checking

    def _build(self, kind: Kind) -> BlockVariant:
        variant = BlockVariant(kind, self.config, self.place, self.options["activation"])
        variant.force(self.forced)
        return variant

    def _made(self, kind: Kind) -> BlockVariant | None:
        """Collective: what one rank cannot build, none does."""
        reason = unavailable(kind, self.config)
        made = None
        if reason is None:
            try:
                made = self._build(kind)
            except Exception as error:  # of other packages, or a shape that the form does not take; said and left out
                reason = f"cannot be built: {type(error).__name__}: {error}"
        return None if self._leave_out(kind.name, reason) else made

    def _leave_out(self, name: str, reason: str | None) -> bool:
        """Whether any rank has a reason; it is noted then. Collective."""
        reasons = names_over_ranks([] if reason is None else [reason])
        if reasons:
            self.left_out[name] = reasons[0]
            if self.place.first:
                Choice("left out", reasons[0]).announce(name)
        return bool(reasons)

    def _reference(self, stock: Sequence[BlockVariant]) -> tuple[BlockVariant, dict[str, torch.Tensor]]:
        """What the others are checked against, and what it computes: the first stock form that runs. Collective."""
        for variant in stock:
            found = self._if_it_runs(variant)
            if found is not None:
                return variant, found
        whole = self._build(WHOLE)
        return whole, self._results(whole)

    def _if_it_runs(self, variant: BlockVariant) -> dict[str, torch.Tensor] | None:
        """What a form of another package computes; None where it refuses. Collective."""
        try:
            found, reason = self._results(variant), None
        except Exception as error:  # each package has kinds of its own; said and left out
            found, reason = {}, f"cannot run: {type(error).__name__}: {str(error)[:200]}"
        return None if self._leave_out(variant.name, reason) else found

    def _check(self, variants: Sequence[BlockVariant], reference: str, want: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Output, input gradient and summed weight gradients of each against the reference, and of its own twin.

        Raises Disagreement for one of ours; what needs more than our code is left out.
        """
        tolerance, found = TOLERANCE[self.config.dtype or "fp32"], {}
        for variant in variants:
            extra = variant.kind in EXTRAS
            got = self._if_it_runs(variant) if extra else self._results(variant)
            if got is None:
                continue
            if self.options.get("plant_error") and variant.name == "ours plain":
                got["output"] = got["output"] * (1 + self.options["plant_error"])
            worst = over_ranks(worst_error(got, want))
            found[variant.name] = {"error": worst.error, "where": worst.where, **self._twin(variant, got)}
            if worst.error > tolerance:
                text = (
                    f"{variant.name} differs from {reference}: relative error {worst.error:.2e} in {worst.where}, "
                    f"allowed {tolerance:.0e}; a wrong result is not timed"
                )
                if not extra:
                    raise Disagreement(text)
                self.left_out[variant.name] = text
        return found

    def _results(self, variant: BlockVariant, twin: bool = False) -> dict[str, torch.Tensor]:
        """Of layers that are replayed, what a replay gives."""
        calls = CALLS_BEFORE_RECORDING + 2 if variant.recorded and not twin else 1
        with repeatable_attention(), variant.mode(twin):
            return [variant.results(*self.inputs[0]) for _ in range(calls)][-1]

    def _twin(self, variant: BlockVariant, got: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What differs in its bits from the serialised twin."""
        if variant.scheduler is None or variant.kind.overlap == "off" or self.options.get("plant_error"):
            return {}
        return {"twin_differs_in": names_over_ranks(different_bits(got, self._results(variant, twin=True)))[:8]}

    # ---- timing

    def rows(self, name: str) -> list[dict[str, Any]]:
        """One row for each variant: milliseconds of the slowest rank, and the ratio to the first."""
        rounds = self.options["rounds"]
        times = run_rounds([self._step(one, name) for one in self.variants], rounds, _WARM_UP, self.place)
        return [self._row(one, name, times, column) for column, one in enumerate(self.variants)]

    def _step(self, variant: BlockVariant, name: str, lanes: Lanes | None = None) -> Callable[[int], Any]:
        """``lanes``: clocks that stand for this step."""
        inputs = [(variant.own(x), variant.own(dy)) for x, dy in self.inputs]

        def step(number: int) -> None:
            x, dy = inputs[number % len(inputs)]
            if name == "iteration":
                variant.ddp.zero_grad_buffer()
            y = variant.forward(x.detach().requires_grad_())
            if name != "forward":
                y.backward(dy)
            if name == "iteration":
                variant.ddp.finish_grad_sync()

        def clocked(number: int) -> None:
            assert lanes is not None
            with lanes:
                step(number)

        return step if lanes is None else clocked

    def _row(self, variant: BlockVariant, name: str, times: Times, column: int) -> dict[str, Any]:
        own = times[:, column]
        ratio = paired_ratio(times[:, 0], own)
        return {
            "impl": variant.name,
            "pass": name,
            **percentiles(own),
            "first": self.variants[0].name,
            "ratio_first_over_this": ratio.value,
            "ratio_first_over_this_low": ratio.low,
            "ratio_first_over_this_high": ratio.high,
            "rounds": len(times),
            "judged": quiet_halves(own),
        }

    # ---- exchanges

    def add_exchanges(self, rows: list[dict[str, Any]], twins: list[dict[str, Any]]) -> None:
        """For each overlapped form but replays: a row for every AllToAll, and one for its step beside its twin's.

        Collective.
        """
        for variant in self.variants:
            if variant.scheduler is not None and variant.kind.overlap != "off" and not variant.recorded:
                found, step = self._exchanges(variant)
                rows += found
                twins.append(step)

    def _exchanges(self, variant: BlockVariant) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        rounds, shared = self.options["rounds"], shared_experts([variant.model])
        clocks = [Lanes(variant.scheduler, self.place.device, shared) for _ in range(2)]  # type: ignore[arg-type]
        overlapped = self._step(variant, "forward+backward", clocks[1])
        as_twin = self._step(variant, "forward+backward", clocks[0])

        def twin(number: int) -> None:
            with variant.mode(True):
                as_twin(number)

        times = run_rounds([twin, overlapped], rounds, _WARM_UP, self.place)
        in_twin, in_overlapped = (self._of_ranks(lanes.take_steps()[-rounds:]) for lanes in clocks)
        alone = alone_ms(clocks[0].cargo(), variant.scheduler.transport, self.place)  # type: ignore[union-attr]
        found = rows_of_exchanges(variant.name, in_twin, in_overlapped, alone)
        gain = difference_of_medians(times[:, 0], times[:, 1])
        step = {
            "impl": variant.name,
            **{f"twin_{name}": ms for name, ms in percentiles(times[:, 0]).items()},
            **{f"overlapped_{name}": ms for name, ms in percentiles(times[:, 1]).items()},
            "hidden_ms": gain.value,
            "hidden_spread_ms": gain.spread,
            "layers": layers_of(variant),
            "judged": all(quiet_halves(times[:, column]) for column in range(2)),
        }
        return [_of_impl(row, variant) for row in found], step

    def _of_ranks(self, mine: Any) -> list[list[Any]]:
        """[round][rank] from this rank's rounds. Collective."""
        every: list[Any] = [None] * self.place.world
        dist.all_gather_object(every, mine)
        return [list(step) for step in zip(*every, strict=True)]


def _of_impl(row: dict[str, Any], variant: BlockVariant) -> dict[str, Any]:
    """A row of ``rows_of_exchanges`` as this bench's.

    Of chunks of heads, whose attention runs beside each other's exchanges without a clock on it, what one exchange
    hides is not told apart: what is exposed of its transfer is, and the step's gain.
    """
    named = {"impl": row["workload"], **{name: value for name, value in row.items() if name != "workload"}}
    chunked = variant.config.attention_chunks != 1 and ("sp2hp" in row["a2a"] or "hp2sp" in row["a2a"])
    return {**named, "hidden_ms": None, "hidden_spread_ms": None} if chunked else named

"""``fluid-npu tune`` on its ranks: forward and backward of a small model under every setting, checked, then timed.

A setting whose gradients differ from stock Megatron's, or which is not bitwise equal to its serialised twin, is never
timed and never chosen; under context parallelism, which stock has with Transformer Engine alone, plain's gradients are
the measure. Of layers that are recorded (CUDA graphs) a replay is checked, and their memory counts. Plain is the
reference: another setting wins only if its paired 95 % interval is faster.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fluid_npu.bench.agreement import TOLERANCE, Disagreement, Gradients, check_agreement, gradients_of
from fluid_npu.bench.machine import describe_machine
from fluid_npu.bench.memory import peak_memory_mb, recordings_mb
from fluid_npu.bench.plant import plant_error
from fluid_npu.bench.result import envelope
from fluid_npu.bench.rig import STOCK, Kind, MockData, Variant, build_variants, fuse_weight_gradients
from fluid_npu.bench.rounds import run_rounds
from fluid_npu.bench.stats import Times, paired_ratio, percentiles, quiet_halves
from fluid_npu.bench.tune_recorded import recorded_mb
from fluid_npu.comm.shards import balanced_part
from fluid_npu.comm.transports.choose import TransportUnavailable
from fluid_npu.train.attention_plan import attention_obstacle
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.halves import halves_are_the_same
from fluid_npu.train.parallel import Place
from fluid_npu.train.profile import Profile, key_of

_WARM_UP = 2
_BATCHES = 4

_PLAIN: dict[str, Any] = {
    "overlap": "off",
    "carry_over": False,
    "dispatch": "plain",
    "moe_chunks": "auto",
    "moe_chunks_of": "auto",
    "local_first": False,
    "interleave_batches": False,
    "attention_chunks": 1,
    "moe_cuda_graph": False,
    "a2a_transport": "collective",
    "a2a_ctas": 0,
}
_DW: dict[str, Any] = {"overlap": "dw"}
_BOTH: dict[str, Any] = {"overlap": "dw", "carry_over": True}
_CHUNKS: dict[str, Any] = {"overlap": "full", "carry_over": True}
_ONCE: dict[str, Any] = {"dispatch": "once-per-rank"}
_STATIC: dict[str, Any] = {**_DW, "dispatch": "static"}
_AHEAD: dict[str, Any] = {"a2a_transport": "high-priority"}
_OWN_FIRST: dict[str, Any] = {"overlap": "full", "moe_chunks": 1, "local_first": True}
_OF_TOKENS: dict[str, Any] = {"moe_chunks": 2, "moe_chunks_of": "tokens"}
_OF_EXPERTS: dict[str, Any] = {"moe_chunks": 2, "moe_chunks_of": "experts"}

#: Name and settings; the first is the reference.
CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (name, {**_PLAIN, **changes})
    for name, changes in (
        ("plain", {}),
        ("dW beside the dispatch's backward", _DW),
        ("dW beside dispatch and combine", _BOTH),
        ("2 chunks of experts, dW beside both", {**_CHUNKS, "moe_chunks": 2}),
        ("4 chunks of experts, dW beside both", {**_CHUNKS, "moe_chunks": 4}),
        ("local rows first, then others, dW beside both", {**_CHUNKS, "moe_chunks": 1, "local_first": True}),
        ("two halves of a micro-batch interleaved", {**_DW, "interleave_batches": True}),
        ("2 chunks of attention heads, dW beside both", {**_BOTH, "attention_chunks": 2}),
        ("tokens once per rank", _ONCE),
        ("tokens once per rank in 2 chunks of them, dW beside both", {**_CHUNKS, **_ONCE, **_OF_TOKENS}),
        ("tokens once per rank in 2 chunks of experts, dW beside both", {**_CHUNKS, **_ONCE, **_OF_EXPERTS}),
        ("tokens to every rank, dW beside the dispatch's backward", _STATIC),
        ("tokens to every rank, recorded, dW beside the dispatch's backward", {**_STATIC, "moe_cuda_graph": True}),
        (
            "tokens to every rank, local rows first, recorded, exchanges at high priority",
            {**_STATIC, **_OWN_FIRST, **_AHEAD, "moe_cuda_graph": True},
        ),
        (
            "tokens once per rank, local rows first, recorded, exchanges at high priority",
            {**_ONCE, **_OWN_FIRST, **_AHEAD, "moe_cuda_graph": True},
        ),
        *(
            (
                f"tokens once per rank, local rows first, 2 chunks of {name}, recorded, exchanges at high priority",
                {**_ONCE, **_OWN_FIRST, **_AHEAD, **chunks, "moe_cuda_graph": True},
            )
            for name, chunks in (("tokens", _OF_TOKENS), ("experts", _OF_EXPERTS))
        ),
        (
            "tokens once per rank, local rows first, 2 chunks of tokens, recorded, high priority on 8 CTAs",
            {**_ONCE, **_OWN_FIRST, **_AHEAD, **_OF_TOKENS, "moe_cuda_graph": True, "a2a_ctas": 8},
        ),
        ("dW beside dispatch and combine, exchanges at high priority", {**_BOTH, **_AHEAD}),
        ("tokens once per rank, dW beside both", {**_BOTH, **_ONCE}),
    )
)


def measure(config: TrainConfig, options: dict[str, Any], place: Place) -> dict[str, Any]:
    """The result on this rank. ``options``: rounds, command, link, plant_error (into the last candidate)."""
    machine = describe_machine(place)
    config = dataclasses.replace(config, device=place.device.name)
    data = MockData(config, place)
    batches = [_own_part(data.batch(number), place) for number in range(_BATCHES)]
    stock = _first(config, place)
    reference = gradients_of(stock, batches[0])
    rows: list[dict[str, Any]] = []
    timed: list[Variant] = []
    for name, settings in CANDIDATES:
        settings = with_transport(settings, config)
        variant = _possible(name, settings, config, place, stock)
        if isinstance(variant, str):
            rows.append({**_row(name, settings), "refused": variant})
            continue
        if options.get("plant_error") and name == CANDIDATES[-1][0]:
            plant_error(variant, options["plant_error"])
        row, fits = _checked(variant, settings, stock, reference, batches[0])
        rows.append(row)
        if fits:
            timed.append(variant)
    times = run_rounds([_step(variant, batches) for variant in timed], options["rounds"], _WARM_UP, place)
    for number, variant in enumerate(timed):
        row = next(row for row in rows if row["setting"] == variant.name)
        row.update(_figures(times, number), peak_memory_mb=_peak(variant, batches[0], place))
    settings, reason = choose(rows)
    hosts: list[Any] = [None] * place.world
    dist.all_gather_object(hosts, platform.node())
    key = key_of(config, place, hosts=len(set(hosts)), link=options.get("link"))
    profile = Profile(key=key, settings=settings, reason=reason)
    model = {"preset": config.model().name, "cut": dict(config.cut), "compared_with": stock.name}
    result = envelope("tune", config, options, place, machine, rows, **model)
    return {**result, "profile": profile.as_dict()}


def with_transport(settings: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The settings by the transport that was asked for, which those that name another one are refused beside."""
    if settings["a2a_transport"] not in ("collective", config.a2a_transport):
        return settings
    return {**settings, "a2a_transport": config.a2a_transport, "a2a_ctas": config.a2a_ctas}


def choose(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Settings and reason from the rows of ``measure``: the fastest of those that are told from plain, else plain."""
    plain = rows[0]
    if plain["refused"]:
        raise Disagreement(f"plain: {plain['refused']}; without it there is nothing to choose from")
    if not all(row["judged"] for row in rows if not row["refused"]):
        return plain["settings"], "too noisy to judge: the medians of two halves of the rounds differ by 10 % or more"
    faster = [row for row in rows[1:] if not row["refused"] and row["ratio_plain_over_this_low"] > 1.0]
    if faster:
        best = min(faster, key=lambda row: row["median_ms"])
        return best["settings"], f"{best['setting']}: {_against_plain(best)}"
    others = "; ".join(f"{row['setting']}: {row['refused'] or _against_plain(row)}" for row in rows[1:])
    return plain["settings"], f"plain is best; {others}"


def _against_plain(row: dict[str, Any]) -> str:
    ratio, low, high = (row[f"ratio_plain_over_this{end}"] for end in ("", "_low", "_high"))
    kept = f"; its recordings keep {row['recordings_mb']:.1f} MiB" if row.get("recordings_mb") else ""
    return f"{row['median_ms']:.2f} ms, {ratio:.3f} times plain's speed (95 %: {low:.3f} to {high:.3f}){kept}"


def _first(config: TrainConfig, place: Place) -> Variant:
    """What all are compared with: stock Megatron, which has no context parallelism here, and plain under it."""
    if config.cp == 1:
        return build_variants((STOCK,), config, place, optimizer="none", reduce=False)[0]
    name, settings = CANDIDATES[0]
    kind = Kind(name=name, impl="fluid", overlap=settings["overlap"])
    return Variant(kind, dataclasses.replace(config, **settings), place, optimizer="none", reduce=False)


def _own_part(batch: dict[str, Any], place: Place) -> dict[str, Any]:
    """This rank's rows of the sequences, without a mask: the layers are causal by type."""
    if place.cp_size == 1:
        return batch
    rows = {name: value for name, value in batch.items() if name != "attention_mask"}
    parts = {name: balanced_part(value, place.cp_size, place.cp_rank, 1) for name, value in rows.items()}
    return {**parts, "attention_mask": None}


def _possible(name: str, settings: dict[str, Any], config: TrainConfig, place: Place, stock: Variant) -> Variant | str:
    """The setting's model, or why there is none; a function of configuration and device, so equal on all ranks."""
    impossible = _impossible(settings, config)
    if impossible is not None:
        return impossible
    try:
        return _variant(name, settings, config, place, stock)
    except TransportUnavailable as error:
        return str(error)
    except ValueError as error:
        if not settings["moe_cuda_graph"]:
            raise
        return str(error).removeprefix("cuda_graph=True: ").partition(" when instantiating ")[0]  # Megatron adds that


def _variant(name: str, settings: dict[str, Any], config: TrainConfig, place: Place, stock: Variant) -> Variant:
    kind = Kind(name=name, impl="fluid", overlap=settings["overlap"])
    own = dataclasses.replace(config, **settings)
    variant = Variant(kind, own, place, optimizer="none", weights=stock.model, reduce=False)
    fuse_weight_gradients(variant)
    return variant


def _impossible(settings: dict[str, Any], config: TrainConfig) -> str | None:
    """Why this model has no such setting, or None."""
    local, chunks = config.model().experts // config.ep, settings["moe_chunks"]
    of_experts = settings["dispatch"] == "plain" or settings["moe_chunks_of"] == "experts"
    if chunks != "auto" and local % chunks and of_experts:
        return f"the {local} experts of a rank make no {chunks} chunks of equally many"
    attention = attention_obstacle(config, settings["attention_chunks"])
    if attention is not None:
        return attention
    if settings["a2a_transport"] != config.a2a_transport != "collective":
        return f"--a2a-transport {config.a2a_transport} is asked for"
    if settings["local_first"] and config.ep == 1:
        return "with --ep 1 all rows are local"
    if settings["interleave_batches"]:
        same, reason = halves_are_the_same(config)
        return None if same else reason
    return None


def _row(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"setting": name, "settings": settings, "error": None, "refused": None, "judged": True}


def _checked(
    variant: Variant, settings: dict[str, Any], stock: Variant, reference: Gradients, batch: Any
) -> tuple[dict[str, Any], bool]:
    """A row without times, and whether it may be timed; equal on all ranks. ``reference``: stock's gradients."""
    row = _row(variant.name, settings)
    twins = [] if settings["overlap"] == "off" else [variant.as_twin()]
    try:
        if settings["moe_cuda_graph"]:
            row["recordings_mb"] = recorded_mb(variant, batch, variant.place)
        worst = check_agreement([stock, variant, *twins], batch, TOLERANCE[variant.config.dtype or "fp32"], reference)
    except Disagreement as error:
        return {**row, "refused": str(error)}, False
    return {**row, "error": worst[variant.name].error}, True


def _step(variant: Variant, batches: Sequence[Any]) -> Any:
    return lambda number: variant.forward_backward(batches[number % len(batches)])


def _peak(variant: Variant, batch: Any, place: Place) -> float:
    """MiB of a step on the rank that needs most, with what recordings keep. Collective."""
    peak = peak_memory_mb(place.device, lambda: variant.forward_backward(batch)) + recordings_mb(variant.model)
    most = torch.tensor([peak], device=place.device.torch_device(place.local_rank))
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def _figures(times: Times, number: int) -> dict[str, Any]:
    mine = np.ascontiguousarray(times[:, number])
    ratio = paired_ratio(np.ascontiguousarray(times[:, 0]), mine)
    return {
        **percentiles(mine),
        "ratio_plain_over_this": ratio.value,
        "ratio_plain_over_this_low": ratio.low,
        "ratio_plain_over_this_high": ratio.high,
        "judged": quiet_halves(mine),
    }

"""Rows of ``bench overlap`` from the exchanges of all rounds and ranks. [N rounds][P ranks][number of the AllToAll]."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fluid_npu.bench.stats import Times, difference_of_medians, percentiles, quiet_halves
from fluid_npu.comm.transports import Transport
from fluid_npu.schedule.definitions import (
    Exchange,
    coverables,
    coverage,
    exposed,
    hidden_fraction,
    median_coverage,
    parts_agree,
    peer_wait,
    pieces_beside,
    region_ms,
    transfers,
)
from fluid_npu.schedule.lanes import Cargo
from fluid_npu.train.parallel import Place

Rounds = Sequence[Sequence[Sequence[Exchange]]]
_ALONE = 7


def rows_of_exchanges(name: str, twin: Rounds, overlapped: Rounds, alone: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each AllToAll, in the order of launches; those of a pipeline share one."""
    transfer = [transfers(step) for step in twin]
    return [_row(name, unit, twin, overlapped, transfer, sum(alone[i] for i in unit)) for unit in _units(twin[0][0])]


def _units(exchanges: Sequence[Exchange]) -> list[list[int]]:
    """Numbers of the exchanges of each row."""
    units: dict[Any, list[int]] = {}
    for number, exchange in enumerate(exchanges):
        units.setdefault(exchange.pipeline or number, []).append(number)
    return list(units.values())


def _row(
    name: str,
    unit: Sequence[int],
    twin: Rounds,
    overlapped: Rounds,
    transfer: Sequence[Sequence[Sequence[float]]],
    alone: float,
) -> dict[str, Any]:
    regions = [
        np.array([fmean(region_ms([rank[i] for i in unit]) for rank in step) for step in kind])
        for kind in (twin, overlapped)
    ]
    gain = difference_of_medians(*regions)
    ranks, first = range(len(twin[0])), twin[0][0][unit[0]]
    beside = _beside([[[rank[i] for i in unit] for rank in step] for step in twin])
    return {
        "workload": name,
        "a2a": f"{len(unit)} {first.pipeline}" if first.pipeline else first.name,
        "bytes": round(fmean(sum(max(rank[i].bytes_to_peers for rank in step) for i in unit) for step in twin)),
        "alone_ms": alone,
        "transfer_ms": median(fmean(sum(step[r][i] for i in unit) for r in ranks) for step in transfer),
        "peer_wait_ms": median(sum(peer_wait([rank[i].flight_ms for rank in step]) for i in unit) for step in twin),
        "exposed_ms": median(
            fmean(sum(exposed(step[r][i].wait_ms, moved[r][i]) for i in unit) for r in ranks)
            for step, moved in zip(overlapped, transfer, strict=True)
        ),
        "hidden_ms": gain.value,
        "hidden_spread_ms": gain.spread,
        "beside": beside,
        "beside_ms": sum(piece["ms"] for piece in beside),
        "coverable_ms": median(
            fmean(sum(coverables(step[r], moved[r])[i] for i in unit) for r in ranks)
            for step, moved in zip(twin, transfer, strict=True)
        ),
        "judged": all(quiet_halves(region) for region in regions),
    }


def step_row(name: str, times: Times, twin: Rounds, rows: Sequence[dict[str, Any]], overlap: str) -> dict[str, Any]:
    """The row of a workload; ``times`` are [N, (plain, twin, overlapped)] of the slowest rank, ``overlap`` its mode."""
    gain = difference_of_medians(times[:, 1], times[:, 2])
    found = median_coverage([coverage(step) for step in twin])
    parts = sum(row["hidden_ms"] for row in rows)
    judged = all(quiet_halves(times[:, column]) for column in range(3))
    row: dict[str, Any] = {"workload": name}
    for column, kind in enumerate(("plain", "twin", "overlapped")):
        figures = percentiles(times[:, column])
        row |= {f"{kind}_ms": figures["median_ms"], f"{kind}_p10_ms": figures["p10_ms"]}
        row[f"{kind}_p90_ms"] = figures["p90_ms"]
    return {
        **row,
        "transfer_ms": found.transfer_ms,
        "peer_wait_ms": found.peer_wait_ms,
        "hidden_ms": gain.value,
        "hidden_spread_ms": gain.spread,
        "hidden_fraction": hidden_fraction(gain.value, gain.spread, found),
        "coverable_ms": found.coverable_ms,
        "a2a_hidden_ms": parts,
        "agrees": parts_agree(gain.value, parts, gain.spread),
        "judged": judged,
        "advice": overlap if gain.value > gain.spread and judged else "off",
    }


def alone_ms(cargo: Sequence[Cargo], transport: Transport, place: Place) -> list[float]:
    """Each exchange by itself, ranks starting together: the median of some of its transfers. Collective."""
    return [_alone(one, transport, place) for one in cargo]


def _alone(cargo: Cargo, transport: Transport, place: Place) -> float:
    source = torch.zeros(cargo.source_shape, dtype=cargo.dtype, device=cargo.device)
    output = torch.empty(cargo.output_shape, dtype=cargo.dtype, device=cargo.device)
    found = []
    for _ in range(_ALONE):
        place.device.synchronize()
        dist.barrier()
        start, end = place.device.event(), place.device.event()
        start.record()
        transport.start(output, source, cargo.output_splits, cargo.input_splits, cargo.group).wait()
        end.record()
        found.append(end.elapsed_ms(start))
    every: list[Any] = [None] * place.world
    dist.all_gather_object(every, found)
    return median(min(times) for times in zip(*every, strict=True))


def _beside(steps: Rounds) -> list[dict[str, Any]]:
    """Names and milliseconds of what runs beside the AllToAlls of a row, mean over ranks, median over rounds."""
    pieces = [[pieces_beside(exchanges) for exchanges in step] for step in steps]
    names = dict.fromkeys(name for step in pieces for rank in step for name, _ in rank)
    return [
        {"name": name, "ms": median(fmean(sum(ms for n, ms in rank if n == name) for rank in step) for step in pieces)}
        for name in names
    ]

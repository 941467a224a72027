"""How long an AllToAll of some sizes takes with each transport, alone and beside an expert's product; kept in a file.

Times are in milliseconds, of the slowest rank: the median of a few rounds, so that one late peer does not decide. What
an exchange adds to a product that it runs beside is its *exposed* time.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.agreement import gathered
from fluid_npu.comm.transports.base import Transport, begin
from fluid_npu.device import kernels_of
from fluid_npu.device.base import Device
from fluid_npu.device.kernels.beside import beside_exchange

_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one exchange."""

    alone_ms: float
    exposed_ms: float

    @property
    def total_ms(self) -> float:
        """A layer's step has as many exchanges with nothing beside them as with something: both count once."""
        return self.alone_ms + self.exposed_ms


#: By transport, then by bytes that a rank sends to its peers.
Table = Mapping[str, Mapping[int, Cost]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured on one kind of device: sizes in bytes to the peers, and the product's matrices."""

    sizes: tuple[int, ...]
    side: int
    dtype: torch.dtype


_WORK = {
    "cpu": Work(sizes=(1 << 16, 1 << 20), side=384, dtype=torch.float32),
    "cuda": Work(sizes=(1 << 20, 8 << 20, 48 << 20), side=8192, dtype=torch.bfloat16),
    "npu": Work(sizes=(1 << 20, 8 << 20, 48 << 20), side=8192, dtype=torch.bfloat16),
}


class Calibration:
    """Tables by topology in a JSON file; without a path nothing is kept."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else Path(path)

    def find(self, topology: str) -> Table | None:
        """The stored table of a topology. Raises ValueError naming the file where that is not ours."""
        stored = self._read().get(topology)
        if stored is None:
            return None
        return {
            name: {int(size): Cost(alone_ms=cost[0], exposed_ms=cost[1]) for size, cost in costs.items()}
            for name, costs in stored.items()
        }

    def keep(self, topology: str, table: Table) -> None:
        """Writes the table; the file is replaced as a whole."""
        if self._path is None:
            return
        plain = {
            name: {str(size): [cost.alone_ms, cost.exposed_ms] for size, cost in costs.items()}
            for name, costs in table.items()
        }
        everything = {**self._read(), topology: plain}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self._path)

    def _read(self) -> dict[str, Any]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self._path}: no calibration of transports ({error}); delete it") from error
        return dict(found)


def topology(groups: Sequence[Any], device: Device, nodes: int) -> str:
    """What a table is good for."""
    worlds = "+".join(str(dist.get_world_size(group)) for group in groups)
    return (
        f"{device.describe()}; torch {torch.__version__}; groups of {worlds} ranks; {nodes} node(s); expert's product"
    )


def measure(transports: Mapping[str, Transport], group: Any, device: Device, where: torch.device) -> Table:
    """The table of a group, the same on all of its ranks; a collective call."""
    work = _WORK[device.name]
    factor = torch.ones(work.side, work.side, device=where, dtype=work.dtype)
    kernels = kernels_of(factor)

    def multiply() -> None:
        with beside_exchange():  # in the form that a layer's products take there
            kernels.grouped_mm(factor, factor.unsqueeze(0), [work.side])

    mine: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in transports}
    for size in work.sizes:
        exchanges = {name: _exchange(transport, size, group, where) for name, transport in transports.items()}
        times = _rounds(exchanges, multiply, device, group)
        for name in transports:
            mine[name][size] = times[name]
    everyone = gathered(mine, group)
    return {
        name: {
            size: Cost(
                alone_ms=max(told[name][size][0] for told in everyone),
                exposed_ms=max(0.0, *(told[name][size][1] for told in everyone)),
            )
            for size in work.sizes
        }
        for name in transports
    }


Exchange = Callable[[Callable[[], None] | None], None]


def _exchange(transport: Transport, size: int, group: Any, where: torch.device) -> Exchange:
    world = dist.get_world_size(group)
    width = 4096
    rows = max(size // (width * max(world - 1, 1)), 1)
    source = torch.zeros(rows * world, width, dtype=torch.uint8, device=where)
    output, splits = torch.empty_like(source), [rows] * world

    def run(beside: Callable[[], None] | None) -> None:
        work = begin(transport, output, source, (splits, splits), group, [splits] * world)
        if beside is not None:
            beside()
        work.wait()

    return run


def _rounds(
    exchanges: Mapping[str, Exchange], multiply: Callable[[], None], device: Device, group: Any
) -> dict[str, tuple[float, float]]:
    """(alone, exposed) of each, interleaved so that all see the same machine."""
    alone: dict[str, list[float]] = {name: [] for name in exchanges}
    exposed: dict[str, list[float]] = {name: [] for name in exchanges}
    for number in range(_ROUNDS + 2):
        product = _timed(multiply, device, group)
        for name, exchange in exchanges.items():
            by_itself = _timed(lambda exchange=exchange: exchange(None), device, group)
            both = _timed(lambda exchange=exchange: exchange(multiply), device, group)
            if number >= 2:
                alone[name].append(by_itself)
                exposed[name].append(both - product)
    return {name: (statistics.median(alone[name]), statistics.median(exposed[name])) for name in exchanges}


def _timed(step: Callable[[], None], device: Device, group: Any) -> float:
    """Milliseconds of one step that all ranks begin together."""
    device.synchronize()
    dist.barrier(group=group)
    begin, end = device.event(), device.event()
    begin.record()
    step()
    end.record()
    return end.elapsed_ms(begin)

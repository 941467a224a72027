#!/usr/bin/env python3
"""Times the AllToAll of each transport on CUDA GPUs, alone and beside dW products. Started by gpu_transports.sh.

Device-side splits are among them, which no user can ask for yet: their time includes the exchange of sizes, which for
the others is the host's and comes on top.

    torchrun --nproc-per-node 2 scripts/time_transports.py --out FILE --budget SECONDS

First blocks of one size, then the rows of a Mixtral layer (4,096 tokens a rank, 8 experts, top-2) under the workloads
W0 to W7 of ``fluid_npu.bench.workloads``, in the step of each that is the most uneven.

In every round each item runs once, in the same order, after a small all-reduce that brings the ranks together. Times
are of CUDA events; the median of a rank's rounds, then the largest of the ranks. Hidden is 1 - (both - product) /
exchange: the median of the differences of a round over the median of the exchange alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.bench.workload_names import DESCRIPTIONS as NAMES
from fluid_npu.bench.workloads import Sizes, counts, period
from fluid_npu.comm.device_splits import open_device_splits
from fluid_npu.comm.transports import (
    CollectiveTransport,
    PairwiseTransport,
    carve_out,
    few_ctas_transport,
    high_priority_transport,
)
from fluid_npu.comm.transports.base import begin
from fluid_npu.comm.transports.peer_open import peer_copy_transport
from fluid_npu.device.kernels.triton_grouped_gemm import Tiles, grouped_dw_

MIB = 1 << 20
WIDTH = 4096  # bf16: 8 KiB a row
Item = Callable[[], None]


def main() -> None:
    """Prints one line a measurement on rank 0."""
    args = _arguments()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    clock = Clock(time.monotonic() + args.budget)
    PRODUCTS.update(products())
    results: list[dict[str, Any]] = []
    world = dist.get_world_size()
    for mib in (32, 64, 8, 1):
        rows = mib * MIB // (2 * WIDTH)
        results += exchanges(f"{mib} MiB", [[rows] * world] * world, clock, PRODUCTS if mib >= 32 else {})
    for name in NAMES:
        results += exchanges(name, table_of(name, world), clock, {LARGE_TRITON: PRODUCTS[LARGE_TRITON]})
    if dist.get_rank() == 0:
        with open(args.out, "w") as file:
            json.dump({"torch": torch.__version__, "results": results}, file, indent=1)
    dist.barrier()
    dist.destroy_process_group()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON file")
    parser.add_argument("--budget", type=float, default=45.0, help="seconds after which no further block is begun")
    return parser.parse_args()


class Clock:
    """Rounds of items, and the time that is left."""

    def __init__(self, end: float) -> None:
        self._end = end
        self._small = torch.zeros(1, device="cuda")

    def over(self) -> bool:
        """Whether any rank has no time left."""
        left = torch.tensor([self._end - time.monotonic()], device="cuda")
        dist.all_reduce(left, op=dist.ReduceOp.MIN)
        return float(left) < 0

    def rounds(self, items: dict[str, Item], count: int = 15, warm: int = 3) -> dict[str, list[float]]:
        """Milliseconds of each item in each round."""
        marks: dict[str, list[Any]] = {name: [] for name in items}
        for number in range(warm + count):
            for name, item in items.items():
                dist.all_reduce(self._small)
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                item()
                end.record()
                if number >= warm:
                    marks[name].append((begin, end))
        torch.cuda.synchronize()
        return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in marks.items()}


def slowest(value: float) -> float:
    """The largest of the ranks."""
    told = torch.tensor([value], device="cuda", dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return float(told)


def products() -> dict[str, Item]:
    """dW of a step: four large experts, 32 small ones, and these with 16 multiprocessors left free."""
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    x, dy = torch.randn(4, 4096, 2048, **bf16), torch.randn(4, 2048, 14336, **bf16)
    into = torch.zeros(4, 4096, 14336, device="cuda")
    rows = 24576
    x_small, dy_small = torch.randn(rows, 2048, **bf16), torch.randn(rows, 2816, **bf16)
    ends = torch.arange(1, 33, device="cuda", dtype=torch.int32) * (rows // 32)

    def large() -> None:
        torch.baddbmm(into, x, dy, out_dtype=torch.float32, out=into)

    def grouped() -> None:
        torch.nn.functional.grouped_mm(x_small.t(), dy_small, offs=ends)

    def carved() -> None:
        with carve_out(16):
            grouped()

    def tiles() -> None:
        grouped_dw_(into, x_rows, dy_rows, ends_large, Tiles(128, 256, 64, 8, 4, described=True))

    x_rows, dy_rows = x.transpose(1, 2).reshape(-1, 4096), dy.reshape(-1, 14336)
    ends_large = torch.arange(1, 5, device="cuda", dtype=torch.int32) * 2048
    small = {"small grouped_mm": grouped, "small grouped_mm carved": carved}
    return {"large baddbmm fp32": large, LARGE_TRITON: tiles, **small}


def _report(line: str, entry: dict[str, Any]) -> dict[str, Any]:
    if dist.get_rank() == 0:
        print(line, flush=True)
    return entry


def _beside(start: Any, clock: Clock, what: str, size: str, products: dict[str, Item]) -> list[dict[str, Any]]:
    """One item's share hidden behind each product."""
    found = []
    for name, product in products.items():
        items: dict[str, Item] = {
            "product": product,
            "both": lambda product=product: around(start, product),  # type: ignore[misc]
            "alone": lambda: around(start, None),
        }
        times = clock.rounds(items)
        extra = [both - own for both, own in zip(times["both"], times["product"], strict=True)]
        own, exchange = slowest(statistics.median(times["product"])), slowest(statistics.median(times["alone"]))
        hidden = 1 - slowest(statistics.median(extra)) / exchange
        line = f"{what:16} {size:>8} beside {name:24} ({own:.3f} ms): exchange {exchange:.3f} ms, hidden {hidden:5.2f}"
        entry = {"what": what, "size": size, "beside": name, "product_ms": own, "ms": exchange, "hidden": hidden}
        found.append(_report(line, entry))
    return found


def around(start: Any, product: Item | None) -> None:
    """Starts, lets the product run, waits."""
    wait = start()
    if product is not None:
        product()
    wait()


PRODUCTS: dict[str, Item] = {}
LARGE_TRITON = "large Triton dW"


TRANSPORTS: dict[str, Any] = {}


def transports() -> dict[str, Any]:
    """By name; made once."""
    if not TRANSPORTS:
        TRANSPORTS["collective"] = CollectiveTransport()
        TRANSPORTS["peer-copy"] = peer_copy_transport("cuda", landing_bytes=160 * MIB)
        TRANSPORTS["peer-copy, ring"] = peer_copy_transport("cuda", ring_bytes=64 * MIB, landing_bytes=0)
        TRANSPORTS["high-priority"] = high_priority_transport()
        TRANSPORTS["few-ctas 8"] = few_ctas_transport(8)
        TRANSPORTS["pairwise"] = PairwiseTransport()
    return TRANSPORTS


def table_of(name: str, world: int) -> list[list[int]]:
    """[source][target] rows of a workload, in the step in which a rank receives the most."""
    sizes = Sizes(ranks=world, experts=8, topk=2, tokens=4096)
    steps = []
    for step in range(period(name, world)):
        sent = [counts(name, step, rank, sizes) for rank in range(world)]
        local = sizes.local
        steps.append([[sum(row[to * local : (to + 1) * local]) for to in range(world)] for row in sent])
    return max(steps, key=lambda table: max(map(sum, zip(*table, strict=True))))


def by_device_splits(source: torch.Tensor, table: list[list[int]], received: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same exchange with its sizes on the device, by 4 and by 16 programs; nothing where it is not possible."""
    found: dict[str, Any] = {}
    sent = torch.tensor(table[dist.get_rank()], device="cuda", dtype=torch.int64)
    most = max(map(sum, zip(*table, strict=True)))
    for programs in (4, 16):
        splits, reason = open_device_splits(
            dist.group.WORLD, capacity=most, row_shape=(WIDTH,), dtype=source.dtype, programs=programs
        )
        if splits is None:
            _report(f"device splits: {reason}", {})
            return {}
        name = f"device splits {programs}"

        def start(splits: Any = splits, name: str = name) -> Any:
            arrival = splits.start(source, sent)
            received[name] = arrival.rows
            return lambda: (arrival.wait(), arrival.release())

        found[name] = start
    return found


def exchanges(what: str, table: list[list[int]], clock: Clock, products: dict[str, Item]) -> list[dict[str, Any]]:
    """Rows of ``table`` to the peers: alone, the host's part of it, and beside the products."""
    group, rank, found = dist.group.WORLD, dist.get_rank(), []
    sent, coming = table[rank], [row[rank] for row in table]
    source = torch.randn(sum(sent), WIDTH, device="cuda", dtype=torch.bfloat16)
    received: dict[str, torch.Tensor] = {}
    most = max(sum(row) - row[number] for number, row in enumerate(table)) * 2 * WIDTH

    def starting(name: str) -> Any:
        transport, output = TRANSPORTS[name], source.new_empty(sum(coming), WIDTH)
        if name != "peer-copy":
            received[name] = output
            splits = (coming, sent)
            return lambda: begin(transport, output, source, splits, group, table).wait

        def start() -> Any:
            landing = transport.land(source, table, group)
            received[name] = landing.rows
            return lambda: (landing.wait(), landing.release())

        return start

    starts = {name: starting(name) for name in transports()}
    starts.update(by_device_splits(source, table, received))
    for name, start in starts.items():
        around(start, None)
        torch.cuda.synchronize()
        if not torch.equal(received[name][: sum(coming)], received["collective"]):
            _report(f"WRONG BYTES: {name}, {what}", {})
    items: dict[str, Item] = {name: (lambda start=start: around(start, None)) for name, start in starts.items()}
    times = clock.rounds(items, count=21)
    for name in starts:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            around(starts[name], None)
        host = slowest((time.perf_counter() - began) / 10 * 1e6)
        ms = slowest(statistics.median(times[name]))
        rate = f"{most / ms / 1e6:6.1f} GB/s to the peers"
        line = f"{name:16} {what:>8} alone {ms:.3f} ms, {rate}, host {host:5.0f} us a call"
        found.append(_report(line, {"what": name, "size": what, "table": table, "ms": ms, "host_us": host}))
    for name, start in starts.items():
        if clock.over():
            break
        found += _beside(start, clock, name, what, products)
    return found


if __name__ == "__main__":
    main()

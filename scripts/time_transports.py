#!/usr/bin/env python3
"""Times the AllToAll of each transport on CUDA GPUs, alone and beside dW products. Started by gpu_transports.sh.

Device-side splits are among them, which no user can ask for yet: their time includes the exchange of sizes, which for
the others is the host's and comes on top.

    torchrun --nproc-per-node 2 scripts/time_transports.py --out FILE --budget SECONDS

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

from fluid_npu.comm.device_splits import open_device_splits
from fluid_npu.comm.transports import (
    CollectiveTransport,
    PairwiseTransport,
    carve_out,
    few_ctas_transport,
    high_priority_transport,
)
from fluid_npu.comm.transports.peer_open import peer_copy_transport

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
    for mib in (32, 64, 8, 1):
        results += exchanges(mib, clock)
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

    return {"large baddbmm fp32": large, "small grouped_mm": grouped, "small grouped_mm carved": carved}


def _report(line: str, entry: dict[str, Any]) -> dict[str, Any]:
    if dist.get_rank() == 0:
        print(line, flush=True)
    return entry


def _beside(start: Any, clock: Clock, what: str, size: str) -> list[dict[str, Any]]:
    """One item's share hidden behind each product."""
    found = []
    for name, product in PRODUCTS.items():
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


def by_device_splits(source: torch.Tensor, rows: int, received: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same exchange with its sizes on the device, by 4 and by 16 programs; nothing where it is not possible."""
    world, found = dist.get_world_size(), {}
    counts = torch.full((world,), rows, device="cuda", dtype=torch.int64)
    for programs in (4, 16):
        splits, reason = open_device_splits(
            dist.group.WORLD, capacity=rows * world, row_shape=(WIDTH,), dtype=source.dtype, programs=programs
        )
        if splits is None:
            _report(f"device splits: {reason}", {})
            return {}
        name = f"device splits {programs}"

        def start(splits: Any = splits, name: str = name) -> Any:
            arrival = splits.start(source, counts)
            received[name] = arrival.rows
            return lambda: (arrival.wait(), arrival.release())

        found[name] = start
    return found


def exchanges(mib: int, clock: Clock) -> list[dict[str, Any]]:
    """``mib`` MiB to each peer: alone, the host's part of it, and beside the products."""
    group, world, found = dist.group.WORLD, dist.get_world_size(), []
    rows = mib * MIB // (2 * WIDTH)
    source = torch.randn(rows * world, WIDTH, device="cuda", dtype=torch.bfloat16)
    splits, received = [rows] * world, {}

    def starting(name: str) -> Any:
        transport, table, output = TRANSPORTS[name], [splits] * world, torch.empty_like(source)
        if name != "peer-copy":
            received[name] = output
            return lambda: transport.start(output, source, splits, splits, group).wait

        def start() -> Any:
            landing = transport.land(source, table, group)
            received[name] = landing.rows
            return lambda: (landing.wait(), landing.release())

        return start

    starts = {name: starting(name) for name in transports()}
    starts.update(by_device_splits(source, rows, received))
    for name, start in starts.items():
        around(start, None)
        torch.cuda.synchronize()
        if not torch.equal(received[name], received["collective"]):
            _report(f"WRONG BYTES: {name}, {mib} MiB", {})
    items: dict[str, Item] = {name: (lambda start=start: around(start, None)) for name, start in starts.items()}
    times = clock.rounds(items, count=21)
    for name in starts:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            around(starts[name], None)
        host = slowest((time.perf_counter() - began) / 10 * 1e6)
        ms = slowest(statistics.median(times[name]))
        rate = mib * MIB * (world - 1) / ms / 1e6
        line = f"{name:16} {mib:4} MiB alone {ms:.3f} ms, {rate:6.1f} GB/s to the peers, host {host:5.0f} us a call"
        found.append(_report(line, {"what": name, "size": f"{mib} MiB", "ms": ms, "host_us": host}))
    for name, start in starts.items():
        if clock.over():
            break
        if mib >= 32 or name in ("collective", "peer-copy") or name.startswith("device splits"):
            found += _beside(start, clock, name, f"{mib} MiB")
    return found


if __name__ == "__main__":
    main()

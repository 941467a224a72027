"""One rank of test_hiding.py: ``hiding_rank.py BYTES TRANSFER_MS RESULT.json``. Times are milliseconds.

gloo's AllToAll posts its send before its receive. Where one rank arrives first its request to receive waits behind
the other's data, and the two directions follow each other: twice bytes/rate. The matmuls therefore last three times
as long, and the rate itself is measured with an exchange that posts the receive first.

Other work on the machine makes a measurement longer, never shorter: each is repeated until one is as it should be, on
all ranks, or many were not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

MOST = 30
a, b = torch.randn(2, 384, 384)


def matmuls(count: int) -> float:
    """Milliseconds of this thread's processor time."""
    start = time.thread_time()
    for _ in range(count):
        a @ b
    return (time.thread_time() - start) * 1e3


def enough(wanted_ms: float) -> int:
    """How many last so long on this machine."""
    matmuls(5)
    return max(1, round(wanted_ms / (min(matmuls(5) for _ in range(5)) / 5)))


def wall_and_processor(function: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds from when all ranks have come, and those in which a thread of this process had a processor."""
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    function()
    return (time.perf_counter() - start) * 1e3, (time.process_time() - used) * 1e3


def everywhere(good: bool) -> bool:
    """Whether all ranks say so."""
    answer = torch.tensor(int(good))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def main(count: int, transfer_ms: float, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    peer = 1 - dist.get_rank()
    source, output = torch.ones(2, count // 4), torch.zeros(2, count // 4)  # one row to each rank
    start = lambda: dist.all_to_all_single(output, source, async_op=True)
    names = ("begun_ms", "ended_ms", "alone_ms", "alone_processor_ms", "exposed_ms")
    found: dict[str, list[float]] = {name: [] for name in names}

    def exchange() -> None:
        receive = dist.irecv(output[peer], peer)
        dist.send(source[peer], peer)
        receive.wait()

    for _ in range(MOST):
        dist.barrier()
        found["begun_ms"].append(time.perf_counter() * 1e3)  # one clock for all processes of a machine
        exchange()
        found["ended_ms"].append(time.perf_counter() * 1e3)
        if everywhere(found["ended_ms"][-1] - found["begun_ms"][-1] <= 1.1 * transfer_ms):
            break
    n = enough(3 * transfer_ms)
    for _ in range(MOST):
        alone, used = wall_and_processor(lambda: start().wait())
        found["alone_ms"].append(alone)
        found["alone_processor_ms"].append(used)
        dist.barrier()
        launch = time.perf_counter()
        work = start()
        launched = time.perf_counter()
        matmuls(n)
        wait = time.perf_counter()
        work.wait()
        found["exposed_ms"].append((launched - launch + time.perf_counter() - wait) * 1e3)
        if everywhere(found["exposed_ms"][-1] <= 0.08 * transfer_ms and used <= 0.22 * transfer_ms):
            break
    assert torch.equal(output, source)
    Path(result).write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
    os._exit(0)  # gloo's threads must not delay the exit

"""Paired, interleaved rounds: in each round every variant runs once, in rotating order, all ranks starting together.

The time of a step is that of its slowest rank.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fluid_npu.bench.stats import Times
from fluid_npu.train.parallel import Place


def run_rounds(steps: Sequence[Callable[[int], Any]], rounds: int, warm_up: int, place: Place) -> Times:
    """``[rounds, variants]`` milliseconds. Each step gets the number of its round. Collective."""
    gc.collect()
    gc.freeze()  # what lives now is not looked at again, so no variant pays for the others' objects
    try:
        rows = [_round(steps, number, place) for number in range(warm_up + rounds)]
    finally:
        gc.unfreeze()
    return np.array(rows[warm_up:], dtype=np.float64)


def _round(steps: Sequence[Callable[[int], Any]], number: int, place: Place) -> list[float]:
    ms = [0.0] * len(steps)
    for turn in range(len(steps)):
        which = (number + turn) % len(steps)
        dist.barrier()
        start = time.perf_counter()
        steps[which](number)
        place.device.synchronize()
        ms[which] = (time.perf_counter() - start) * 1e3
    slowest = torch.tensor(ms, dtype=torch.float32, device=place.device.torch_device(place.local_rank))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return [float(value) for value in slowest.tolist()]

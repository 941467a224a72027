"""Short measurements on the job's own ranks, which plans are made from: the same figures on every rank.

Each figure is the median of a few rounds; what planners get is that of the slowest rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fluid_npu.comm.transports import Transport
from fluid_npu.train.parallel import Place

_ROUNDS, _WARM_UP = 7, 2
MIB = 2**20
FEWER = 8
"""The small exchange of ``exchange_ms`` has this part of the rows."""


@dataclass(frozen=True)
class LinkCosts:
    """An exchange takes ``alpha_ms + MiB * beta_ms_per_mib``; ``hiding`` is the share of it that dW beside it hides."""

    alpha_ms: float
    beta_ms_per_mib: float
    hiding: float


def timed(
    place: Place, call: Callable[[], Any], before: Callable[[], Any] = lambda: None, rounds: int = _ROUNDS
) -> tuple[float, float]:
    """Median and spread (between the quartiles) of a call in ms, ``before`` each of which something else is done."""
    times = []
    for _ in range(_WARM_UP + rounds):
        place.device.synchronize()
        before()
        start, end = place.device.event(), place.device.event()
        start.record()
        call()
        end.record()
        times.append(end.elapsed_ms(start))
    kept = sorted(times[_WARM_UP:])
    return median(kept), kept[3 * len(kept) // 4] - kept[len(kept) // 4]


def exchange_ms(place: Place, transport: Transport, group: Any, sent: Tensor, dw: Callable[[], Any]) -> list[float]:
    """An AllToAll of ``sent``, a small one, the whole one beside dW, and the spread of these. Collective."""

    def exchange(rows: Tensor, beside: Callable[[], Any] = lambda: None) -> None:
        work = transport.start(torch.empty_like(rows), rows, None, None, group)
        beside()
        work.wait()

    small = sent[: sent.shape[0] // FEWER]
    together = lambda: dist.barrier(group=group)  # ranks start each round at once
    found = [
        timed(place, lambda: exchange(sent), together),
        timed(place, lambda: exchange(small), together),
        timed(place, lambda: exchange(sent, dw), together),
    ]
    return [*(ms for ms, _ in found), max(spread for _, spread in found)]


def link_costs(whole_ms: float, small_ms: float, beside_ms: float, dw_ms: float, mib: float) -> LinkCosts:
    """From what ``exchange_ms`` found of an exchange of so many MiB, and what dW takes alone."""
    beta = max(0.0, (whole_ms - small_ms) / (mib - mib / FEWER))
    saved = (whole_ms + dw_ms - beside_ms) / max(min(whole_ms, dw_ms), 1e-6)
    return LinkCosts(
        alpha_ms=max(0.0, small_ms - beta * mib / FEWER), beta_ms_per_mib=beta, hiding=min(max(saved, 0.0), 1.0)
    )


def everywhere(place: Place, good: bool) -> bool:
    """Whether all ranks say so. Collective."""
    answers: list[Any] = [None] * place.world
    dist.all_gather_object(answers, good)
    return all(answers)


def slowest(place: Place, figures: list[float]) -> list[float]:
    """The largest of all ranks, of each figure. Collective."""
    table = torch.tensor(figures, dtype=torch.float32, device=place.device.torch_device(place.local_rank))
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return [float(ms) for ms in table]

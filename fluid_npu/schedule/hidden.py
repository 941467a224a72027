"""How much time training hid: some steps run as their serialised twin, with clocks on their AllToAlls.

The words are those of ``schedule.definitions``. Steps of a training run are not paired, so the spread of the difference
of medians resamples twins and overlapped steps each by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from fluid_npu.device import Device
from fluid_npu.schedule.definitions import Coverage, Exchange, coverage, hidden_fraction, median_coverage
from fluid_npu.schedule.lanes import Lanes, Span
from fluid_npu.schedule.scheduler import BackwardScheduler

_RESAMPLES = 1000


def is_twin(step: int, overlap: str, every: int) -> bool:
    """Whether a step (counted from 1) runs as its serialised twin: a function of the step's number alone."""
    return overlap != "off" and step % every == 0


class TwinClock:
    """Runs twins of the schedulers of one rank and says what of their AllToAlls could be covered."""

    def __init__(
        self, schedulers: Sequence[BackwardScheduler], device: Device, modules: Sequence[torch.nn.Module] = ()
    ) -> None:
        self._schedulers, self._device, self._modules = list(schedulers), device, list(modules)
        self._lanes: list[Lanes] = []

    def twin(self) -> AbstractContextManager[None]:
        """Runs the body as the serialised twin, with clocks."""
        return self.clocked(serialised=True)

    @contextmanager
    def clocked(self, *, serialised: bool) -> Iterator[None]:
        """Runs the body with clocks, as the twin or as it is."""
        self._lanes = []
        with ExitStack() as stack:
            for number, scheduler in enumerate(self._schedulers):
                if serialised:
                    stack.enter_context(scheduler.serialise())
                modules = self._modules if number == 0 else ()
                self._lanes.append(stack.enter_context(Lanes(scheduler, self._device, modules)))
            yield

    def spans(self) -> list[Span]:
        """Of the last body, this rank's lanes in ms from its beginning. Waits for the device."""
        return [span for lanes in self._lanes for span in lanes.spans()]

    def coverage(self) -> Coverage:
        """Of the last twin, mean over the ranks of this rank's groups. Collective over each of those groups."""
        return gathered_coverage([exchange for lanes in self._lanes for exchange in lanes.take()])


def gathered_coverage(exchanges: Sequence[Exchange]) -> Coverage:
    """Sums over the groups of a rank's exchanges. Collective: every rank of a group has made the same exchanges."""
    found = [_of_group(ranks, exchanges) for ranks in dict.fromkeys(exchange.ranks for exchange in exchanges)]
    return Coverage(**{item.name: sum(getattr(one, item.name) for one in found) for item in fields(Coverage)})


def _of_group(ranks: tuple[int, ...], exchanges: Sequence[Exchange]) -> Coverage:
    mine = [exchange for exchange in exchanges if exchange.ranks == ranks]
    every: list[list[Exchange]] = [mine] * len(ranks)
    if len(ranks) > 1:
        dist.all_gather_object(every, mine, group=mine[0].group)
    return coverage(every)


@dataclass
class OverlapStats:
    """Step times of overlapped steps and of twins, warm-up left out."""

    overlapped_ms: list[float] = field(default_factory=list)
    twin_ms: list[float] = field(default_factory=list)
    covered: list[Coverage] = field(default_factory=list)

    def add(self, step_ms: float, twin: Coverage | None = None) -> None:
        """Takes one step; ``twin`` is a twin's coverage."""
        if twin is None:
            self.overlapped_ms.append(step_ms)
        else:
            self.twin_ms.append(step_ms)
            self.covered.append(twin)

    def report(self, overlap: str) -> dict[str, float | None]:
        """hidden_ms, signed, its spread, and hidden_fraction; 0 and None with overlap off, None where no twin ran."""
        if overlap == "off":
            return {"hidden_ms": 0.0, "hidden_spread_ms": None, "hidden_fraction": None}
        if not self.twin_ms or not self.overlapped_ms:
            return {"hidden_ms": None, "hidden_spread_ms": None, "hidden_fraction": None}
        hidden = median(self.twin_ms) - median(self.overlapped_ms)
        spread = spread_of_medians(self.twin_ms, self.overlapped_ms)
        fraction = hidden_fraction(hidden, spread, median_coverage(self.covered))
        return {"hidden_ms": hidden, "hidden_spread_ms": spread, "hidden_fraction": fraction}


def spread_of_medians(a_ms: Sequence[float], b_ms: Sequence[float]) -> float:
    """Half the 95 % interval of median(a) - median(b), a and b resampled each by itself."""
    draw = np.random.default_rng(0)
    medians = [
        np.median(np.asarray(ms)[draw.integers(0, len(ms), size=(_RESAMPLES, len(ms)))], axis=1) for ms in (a_ms, b_ms)
    ]
    low, high = np.percentile(medians[0] - medians[1], (2.5, 97.5))
    return float(high - low) / 2

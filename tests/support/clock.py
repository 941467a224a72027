"""A clock that only sleeping moves, so that planted milliseconds are found to the microsecond on any machine.

    with planted_time() as clock:
        ...  # time.sleep() returns at once and time.perf_counter() and time.monotonic() are ahead by as much

What computes or waits for a peer takes no time here, so a step takes what was planted on its longest path and no
more, however busy the machine is. The clock is the thread's that opened it, which on CPUs runs backward too; other
threads keep the real one. A rank that is waited for is ahead on its own clock alone: see ``MeetingTransport``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.base import Table, Transport, begin


class Clock:
    """Seconds that have been slept since it was made."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def sleep(self, seconds: float) -> None:
        """Moves on by that; it never goes back."""
        self.seconds += max(0.0, seconds)

    def read(self) -> float:
        return self.seconds

    def meet(self) -> None:
        """A barrier of all ranks: goes on when the last one has come."""
        latest = torch.tensor([self.seconds], dtype=torch.float64)
        dist.all_reduce(latest, dist.ReduceOp.MAX)
        self.seconds = latest.item()


@contextmanager
def planted_time() -> Iterator[Clock]:
    """Puts a ``Clock`` behind this thread's ``time.sleep``, ``time.perf_counter`` and ``time.monotonic``."""
    clock, mine = Clock(), threading.get_ident()

    def only_here(planted: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (planted if threading.get_ident() == mine else real)(*args)

    with (
        mock.patch.object(time, "sleep", only_here(clock.sleep, time.sleep)),
        mock.patch.object(time, "perf_counter", only_here(clock.read, time.perf_counter)),
        mock.patch.object(time, "monotonic", only_here(clock.read, time.monotonic)),
    ):
        yield clock


class MeetingTransport:
    """The inner transport between ranks with clocks of their own: none goes on before the last one has come.

    Every exchange gathers when each rank launched it, so it costs one collective more.
    """

    def __init__(self, inner: Transport, clock: Clock) -> None:
        self.name, self._inner, self._clock = inner.name, inner, clock

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
        table: Table | None = None,
    ) -> _Meeting:
        work = begin(self._inner, output, source, (output_splits, input_splits), group, table)
        launched = torch.tensor([self._clock.seconds], dtype=torch.float64)
        return _Meeting(work, dist.all_reduce(launched, dist.ReduceOp.MAX, group, async_op=True), launched, self._clock)


class _Meeting:
    def __init__(self, work: Any, gathering: Any, launched: torch.Tensor, clock: Clock) -> None:
        self._work, self._gathering, self._launched, self._clock = work, gathering, launched, clock

    def wait(self) -> None:
        self._work.wait()
        self._gathering.wait()
        self._clock.sleep(self._launched.item() - self._clock.seconds)

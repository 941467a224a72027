"""AllToAll in two legs on a host: a thread issues the second leg, which is noted where the program asks for it.

The thread is a stream of its own, *second legs*: it comes after the program's calls so far, then waits for the messages
of the first leg, then issues those of the second, which the program waits for. What the thread itself calls is not
noted: when it runs differs from time to time, what it promises does not. On an accelerator the program issues both
legs, on streams that are recorded as all others.
"""

from __future__ import annotations

import time
from typing import Any

from fluid_npu.comm.transports.two_level import HostLegs
from fluid_npu.order.log import Log
from fluid_npu.order.patching import Patches
from fluid_npu.order.process_groups import ProcessGroupHooks
from fluid_npu.order.records import HOST

_LANE = "second legs"


class TwoLevelHooks:
    """Notes the second legs while installed."""

    def __init__(self, log: Log, groups: ProcessGroupHooks) -> None:
        self._log = log
        self._groups = groups

    def install(self, patches: Patches) -> None:
        """Wraps the transport's work on a host."""
        patches.wrap(HostLegs, "follow", self._follow)
        patches.wrap(HostLegs, "wait", self._wait)

    def _follow(self, old: Any) -> Any:
        def follow(legs: Any, lane: Any) -> Any:
            at = time.perf_counter()
            first = [number for work in legs.begun.first for number in self._groups.numbers_of(work)]
            for number in first:
                self._log.add("landed", of=number, stream=_LANE, at=at)
            second = [self._groups.message(call, after=_LANE) for call in legs.begun.then]
            legs.order_numbers = first + second
            return old(legs, lane)

        return follow

    def _wait(self, old: Any) -> Any:
        def wait(legs: Any) -> None:
            at = time.perf_counter()
            numbers, legs.order_numbers = getattr(legs, "order_numbers", []), []
            begun, finish = legs.begun, legs.begun.finish

            def landed() -> None:
                for number in numbers:
                    self._log.add("landed", of=number, stream=HOST, at=at)
                finish()

            begun.finish = landed
            old(legs)

        return wait

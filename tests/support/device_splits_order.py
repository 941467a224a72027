"""Several ranks' exchanges by device-side splits in one process, recorded for the order checker, with one fault each.

Each rank has two streams, as on a GPU: that of the program, and that of the kernels which tell and send.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from fluid_npu.order.checker import Report, check
from fluid_npu.order.device_splits import DeviceSplitsHooks
from fluid_npu.order.log import Log
from fluid_npu.order.memory import Memory
from fluid_npu.order.patching import Patches
from fluid_npu.order.records import Access
from tests.support.device_splits import Ranks

_EVEN = [[1, 1], [1, 1]]
_REMOTE = "remote-write-in-use"
#: Each fault, and a finding that it makes: its kind, and which two operations have no order.
FAULTS = {
    "no acknowledgement is waited for": (_REMOTE, "reads table", "device-splits tell"),
    "no acknowledgement is given": ("empty-wait", "await", "await"),
    "an area is read on after its next use began": (_REMOTE, "reads rows", "device-splits send"),
    "a table is read on after its release": (_REMOTE, "reads table", "device-splits tell"),
    "rows are sent before all tables are there": (_REMOTE, "device-splits send", "device-splits tell"),
    "rows are read before they have landed": (_REMOTE, "reads rows", "device-splits send"),
    "one rank sees no overflow": ("not-agreed", "overflow", "fine"),
}


class _Hooks(DeviceSplitsHooks):
    """Notes each rank's calls in a record of its own."""

    def __init__(self, ranks: Ranks, fault: str) -> None:
        self.logs = [Log(rank, "ranks in one process") for rank in range(ranks.world)]
        super().__init__(self.logs[0], Memory(self.logs[0]), nullcontext)
        self.ranks, self.fault, self.lane = ranks, fault, 0

    def _log_of(self, window: Any) -> Log:
        return self.logs[window.index]

    def _stream(self, window: Any) -> str:
        return stream(window.index, self.lane)

    def _window(self, window: Any) -> Tensor:
        return self.ranks.memory[window.index]

    def _reads(self, window: Any, tensor: Tensor) -> tuple[Access, ...]:
        return ()  # ``Ranks`` does not keep what it sends; who keeps it is no part of this

    def _await_all(self, window: Any, flag: str, count: int) -> None:
        left_out = {
            "no acknowledgement is waited for": "released",
            "rows are sent before all tables are there": "counted",
            "rows are read before they have landed": "landed",
        }
        if left_out.get(self.fault) != flag:
            super()._await_all(window, flag, count)


def stream(rank: int, lane: int) -> str:
    """0 is the program's, 1 that of the kernels."""
    return f"cuda:{rank}/{lane}"


class _Program:
    """What each rank does, one after the other."""

    def __init__(self, device: str, fault: str) -> None:
        self.ranks, self.fault = Ranks(2, 4, 2, device), fault
        self.hooks = _Hooks(self.ranks, fault)

    def start(self, table: list[list[int]], number: int) -> list[Tensor]:
        self._follow(0, 1, f"begin {number}")
        self.hooks.lane = 1
        right = self.ranks.windows[1]
        if self.fault == "one rank sees no overflow" and number == 0:  # its two areas are one, so nothing is beyond
            self.ranks.windows[1] = replace(right, capacity=8)
        tickets = self.ranks.start(table, number)
        self.ranks.windows[1] = right
        return tickets

    def finish(self, tickets: list[Tensor], number: int) -> None:
        self._follow(1, 0, f"sent {number}")
        self.hooks.lane = 0
        self.ranks.wait(tickets)
        self._read("reads rows", number, rows=True)
        self._read("reads table", number, table=self.fault != "a table is read on after its release")
        self.ranks.release(tickets[: 1 if self.fault == "no acknowledgement is given" else 2])
        self._read("reads table", number, table=self.fault == "a table is read on after its release")

    def read_again(self, number: int) -> None:
        """Rows of an exchange whose area has been given to another by now."""
        late = self.fault == "an area is read on after its next use began"
        self._read("reads rows", number, rows=number >= 0 and late)

    def _follow(self, first: int, then: int, event: str) -> None:
        """The one stream waits for what the other has so far."""
        for rank, log in enumerate(self.hooks.logs):
            log.add("record", event=event, stream=stream(rank, first))
            log.add("wait", event=event, stream=stream(rank, then))

    def _read(self, name: str, number: int, *, rows: bool = False, table: bool = False) -> None:
        for rank, window in enumerate(self.ranks.windows):
            area, of_table = self.ranks.capacity * window.row_bytes, window.world**2 * 8
            place, size = window.table_at + number % 2 * of_table, of_table
            if rows:
                place, size = window.areas_at + number % 2 * area, area
            if rows or table:
                reads = (Access(f"window of {window.name}", place, place + size, rank),)
                self.hooks.logs[rank].add("op", name=name, stream=stream(rank, 0), reads=reads)


def recorded(device: str, fault: str) -> Report:
    """Four exchanges, two of them under way at a time; the first has more rows than one rank's area holds."""
    program, patches = _Program(device, fault), Patches()
    program.hooks.install(patches)
    try:
        for number in range(0, 4, 2):
            full = [[4, 0], [4, 0]] if number == 0 else _EVEN
            under_way = [(program.start(full, number), number), (program.start(_EVEN, number + 1), number + 1)]
            program.read_again(number - 1)
            for tickets, of in under_way:
                program.finish(tickets, of)
    finally:
        patches.undo()
    return check({rank: log.entries for rank, log in enumerate(program.hooks.logs)})

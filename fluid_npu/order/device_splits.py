"""Device-side splits: whose window each kernel of an exchange writes and reads, and what the ranks' flags order.

A window is memory of its owner that all ranks of a group know by the group's name. A flag that comes to a number is a
signal, waiting for the number is an await of that signal. Kernels are no operators of torch, so they are noted from the
calls that submit them (``device.kernels.triton_device_splits``):

    tell      awaits that all ranks have released exchange n - 2; writes its row of table n modulo 2 in every window
    send      awaits all rows of the table; reads it, and writes rows into area n modulo 2 of the others' windows
    await_    awaits that all ranks have written theirs
    release   tells all ranks that area and table are not read any more

What ``send`` writes is in a table that only the device has, so the host waits for it here and reads it: this is for
records, not for speed. What a rank finds, FINE or OVERFLOW, is noted as *agreed*: the checker wants it alike on all
ranks, since rows that one rank sends and another does not wait for go into an area that is used for something else.
Open the windows before recording begins, and record from their first exchange on: what was told before is not known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fluid_npu.comm.device_splits import DeviceSplits
from fluid_npu.order.log import Log
from fluid_npu.order.memory import Memory, stream_of
from fluid_npu.order.patching import Patches
from fluid_npu.order.records import Access

_KERNELS = "fluid_npu.device.kernels.triton_device_splits"
_STATES = {0: "fine", 1: "overflow"}


class DeviceSplitsHooks:
    """Notes the calls while installed. ``quiet``: around what is done to make the record and is no part of it."""

    def __init__(self, log: Log, memory: Memory, quiet: Callable[[], AbstractContextManager[None]]) -> None:
        self._log = log
        self._memory = memory
        self._quiet = quiet
        self._begins: dict[str, int] = {}
        self._windows: dict[str, Tensor] = {}

    def install(self, patches: Patches) -> None:
        """Wraps the kernels' calls, if anything has loaded them."""
        kernels = sys.modules.get(_KERNELS)
        if kernels is None:
            return
        patches.wrap(DeviceSplits, "start", self._start)
        for name in ("tell", "send", "await_", "release"):
            patches.wrap(kernels, name, getattr(self, f"_{name.strip('_')}"))

    def adopt(self, window: Any, memory: Tensor) -> None:
        """The memory is this rank's window."""
        whole = self._memory.access(memory)
        self._begins[window.name] = 0 if whole is None else whole.start
        self._memory.adopt(memory, _name(window))
        self._windows[window.name] = memory

    def _start(self, old: Any) -> Any:
        def start(splits: Any, rows: Tensor, counts_P: Tensor) -> Any:
            window = splits._window
            if window.name not in self._begins:
                self.adopt(window, splits._windows[window.index])
            return old(splits, rows, counts_P)

        return start

    def _tell(self, old: Any) -> Any:
        def tell(window: Any, counts_P: Tensor, number: Tensor, ticket: Tensor, spins: int) -> None:
            log, stream, n = self._log_of(window), self._stream(window), self._read(number)[0]
            if n >= 2:
                self._await_all(window, "released", n - 1)
            writes = tuple(self._row_of_table(window, n, peer) for peer in range(window.world))
            log.add("op", name="device-splits tell", stream=stream, reads=self._reads(window, counts_P), writes=writes)
            self._signal_all(window, "counted", n + 1)
            old(window, counts_P, number, ticket, spins)

        return tell

    def _send(self, old: Any) -> Any:
        def send(window: Any, rows: Tensor, ticket: Tensor, done: Tensor, spins: int, programs: int) -> None:
            log, stream = self._log_of(window), self._stream(window)
            old(window, rows, ticket, done, spins, programs)
            n, state = self._read(ticket)
            self._await_all(window, "counted", n + 1)
            table = self._table(window, n)
            writes = () if state else tuple(self._rows_for_peers(window, n, table))
            reads = (*self._reads(window, rows), self._whole_table(window, n))
            log.add("op", name="device-splits send", stream=stream, reads=reads, writes=writes)
            log.add("agreed", event=f"{_name(window)}: exchange {n}", name=_STATES.get(state, "lost"), stream=stream)
            if state >= 0:
                self._signal_all(window, "landed", n + 1)

        return send

    def _await(self, old: Any) -> Any:
        def await_(window: Any, ticket: Tensor, spins: int) -> None:
            self._await_all(window, "landed", self._read(ticket)[0] + 1)
            old(window, ticket, spins)

        return await_

    def _release(self, old: Any) -> Any:
        def release(window: Any, ticket: Tensor) -> None:
            self._signal_all(window, "released", self._read(ticket)[0] + 1)
            old(window, ticket)

        return release

    # ---- what differs where several ranks are in one process

    def _log_of(self, window: Any) -> Log:
        return self._log

    def _stream(self, window: Any) -> str:
        return stream_of(window.bases_P.device)

    def _memory_of(self, window: Any) -> Memory:
        return self._memory

    def _window(self, window: Any) -> Tensor:
        return self._windows[window.name]

    # ---- entries

    def _await_all(self, window: Any, flag: str, count: int) -> None:
        for peer in range(window.world):
            event = _event(window, flag, count, peer, window.index)
            self._log_of(window).add("await", event=event, stream=self._stream(window))

    def _signal_all(self, window: Any, flag: str, count: int) -> None:
        for peer in range(window.world):
            event = _event(window, flag, count, window.index, peer)
            self._log_of(window).add("signal", event=event, stream=self._stream(window))

    def _read(self, numbers: Tensor) -> list[int]:
        with self._quiet():
            return [int(number) for number in numbers.cpu()]

    def _table(self, window: Any, n: int) -> list[list[int]]:
        """Rows from each rank to each, as this rank was told them: what the kernel has read."""
        size = window.world**2 * 8
        with self._quiet():
            told = self._window(window)[window.table_at + (n % 2) * size :][:size].view(torch.int64)
            found: list[list[int]] = told.cpu().view(window.world, window.world).tolist()
        return found

    def _reads(self, window: Any, tensor: Tensor) -> tuple[Access, ...]:
        access = self._memory_of(window).access(tensor)
        return () if access is None else (access,)

    def _row_of_table(self, window: Any, n: int, owner: int) -> Access:
        place = window.table_at + (n % 2) * window.world**2 * 8 + window.index * window.world * 8
        return self._bytes(window, place, window.world * 8, owner)

    def _whole_table(self, window: Any, n: int) -> Access:
        size = window.world**2 * 8
        return self._bytes(window, window.table_at + (n % 2) * size, size, window.index)

    def _rows_for_peers(self, window: Any, n: int, table: list[list[int]]) -> Iterator[Access]:
        """Behind the rows of lower ranks, in the area of each target."""
        area = window.areas_at + (n % 2) * window.capacity * window.row_bytes
        for target in range(window.world):
            before = sum(row[target] for row in table[: window.index])
            place, rows = area + before * window.row_bytes, table[window.index][target]
            yield self._bytes(window, place, rows * window.row_bytes, target)

    def _bytes(self, window: Any, place: int, size: int, owner: int) -> Access:
        """Bytes are counted from the begin of the storage, as those of a tensor are; it begins alike on all ranks."""
        start = self._begins.get(window.name, 0) + place
        return Access(_name(window), start, start + size, _rank(window, owner))


def _name(window: Any) -> str:
    return f"window of {window.name}"


def _rank(window: Any, index: int) -> int:
    return int(window.ranks[index]) if window.ranks else index


def _event(window: Any, flag: str, count: int, teller: int, told: int) -> str:
    return f"{_name(window)}: {flag} {count} by {_rank(window, teller)} to {_rank(window, told)}"

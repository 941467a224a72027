"""Schedules written by hand, for the order checker: what a job of several ranks submits, as entries of a record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fluid_npu.order.records import Access, Entry

#: A device has a stream for computing and one for communication.
COMPUTE, COMM, SIDE = "npu:0/1", "npu:0/2", "npu:0/3"


class Rank:
    """One process. Buffers are names of 64 bytes; ``"x[0:8]"`` is a part of one, ``"1:x"`` is one of rank 1."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.entries: list[Entry] = []
        self.add("process", name="by hand")
        self.add("group", group="all", ranks=tuple(range(world)))

    def add(self, kind: str, **fields: Any) -> int:
        """Any entry; returns its number. ``line`` is where the schedule calls."""
        number = len(self.entries) + 1
        self.entries.append(Entry(kind=kind, rank=self.rank, number=number, line=_line(), **fields))
        return number

    def op(self, name: str, reads: str = "", writes: str = "", on: str = COMPUTE) -> int:
        """A kernel on a stream (or on the host)."""
        return self.add("op", name=name, stream=on, reads=_accesses(reads), writes=_accesses(writes))

    def alloc(self, buffer: str, on: str | None = COMPUTE) -> None:
        """Memory that belongs to a stream; None: to the host."""
        self.add("alloc", alloc=buffer, size=64, stream=on)

    def free(self, buffer: str, told: Sequence[str] = ()) -> None:
        """The last reference goes; ``told`` are streams named by record_stream."""
        self.add("free", alloc=buffer, streams=tuple(told))

    def record(self, event: str, on: str = COMPUTE) -> None:
        self.add("record", event=event, stream=on)

    def wait(self, event: str, on: str = COMPUTE) -> None:
        self.add("wait", event=event, stream=on)

    def a2a(self, name: str, reads: str, writes: str, on: str | None = COMM, **fields: Any) -> int:
        """An AllToAll on its own stream; no events around it."""
        buffers = {"reads": _accesses(reads), "writes": _accesses(writes)}
        return self.add("collective", name="alltoall", label=name, stream=on, **{"group": "all", **buffers, **fields})

    def async_a2a(self, name: str, reads: str, writes: str, **fields: Any) -> int:
        """An AllToAll of torch.distributed on an accelerator: it waits for the compute stream by itself."""
        return self.a2a(name, reads, writes, after=COMPUTE, **fields)

    def gloo_a2a(self, name: str, reads: str, writes: str, **fields: Any) -> int:
        """An AllToAll of a backend that works on the host's memory, in a thread of its own."""
        return self.a2a(name, reads, writes, on=None, **fields)

    def land(self, number: int, on: str = COMPUTE) -> None:
        """``work.wait()``."""
        self.add("landed", of=number, stream=on)


class Job:
    """All ranks."""

    def __init__(self, world: int = 1) -> None:
        self.ranks = [Rank(rank, world) for rank in range(world)]

    @property
    def record(self) -> dict[int, list[Entry]]:
        """What the checker takes."""
        return {rank.rank: rank.entries for rank in self.ranks}


def _accesses(text: str) -> tuple[Access, ...]:
    return tuple(_access(word) for word in text.split())


def _access(word: str) -> Access:
    name, _, part = word.partition("[")
    start, _, stop = part.rstrip("]").partition(":")
    owner, _, buffer = name.rpartition(":")
    return Access(buffer, int(start or 0), int(stop or 64), int(owner) if owner else None)


def _line() -> str:
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_name}:{frame.f_lineno}"

"""Two operations on the same bytes, one of them a write, must be ordered; a free must come after every use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from fluid_npu.order.findings import Finding, Operation
from fluid_npu.order.graph import Clock
from fluid_npu.order.records import Access, Entry
from fluid_npu.order.timeline import Timeline

Place = tuple[int, int | str]


@dataclass(frozen=True)
class _Use:
    """One access of an operation, kept until something that is ordered after it covers it."""

    entry: Entry
    access: Access
    write: bool
    end: int


class Hazards:
    """Looks at the operations in an order that respects happens-before, and remembers who used which bytes last."""

    def __init__(self, timeline: Timeline, clocks: list[Clock]) -> None:
        self._timeline = timeline
        self._clocks = clocks
        self._uses: dict[Place, list[_Use]] = defaultdict(list)
        self._freed: dict[Place, Entry] = {}
        self.findings: list[Finding] = []

    def visit(self, entry: Entry) -> None:
        """One operation or free."""
        span = self._timeline.spans[entry.rank, entry.number]
        clock = self._clocks[span.start]
        if entry.kind == "free":
            self._visit_free(entry, clock)
            return
        new = [_Use(entry, access, write, span.end) for access, write in _accesses(entry)]
        for use in new:
            self._compare(use, clock)
        for use in new:
            uses = self._uses[_place(use)]
            uses[:] = [old for old in uses if not self._covered(old, use, clock)]
            uses.append(use)

    def _compare(self, use: _Use, clock: Clock) -> None:
        place = _place(use)
        if place in self._freed:
            self._add("used-after-free", self._freed[place], use.entry, use.access)
        for old in self._uses[place]:
            if not (old.write or use.write) or not _overlap(old.access, use.access):
                continue
            if old.entry is not use.entry and not self._timeline.graph.knows(clock, old.end):
                self._add(*_name(old, use), _common(old.access, use.access))

    def _covered(self, old: _Use, use: _Use, clock: Clock) -> bool:
        """Whether whoever conflicts with the old use conflicts with the new one, or comes after both."""
        inside = use.access.start <= old.access.start and old.access.stop <= use.access.stop
        if not inside or old.entry is use.entry or old.write > use.write:
            return False
        return self._timeline.graph.knows(clock, old.end)

    def _visit_free(self, entry: Entry, clock: Clock) -> None:
        assert entry.alloc is not None
        place = (entry.rank, entry.alloc)
        for old in self._uses.pop(place, []):
            if not self._timeline.graph.knows(clock, old.end):
                self._add("freed-in-flight", old.entry, entry, old.access)
        self._freed[place] = entry

    def _add(self, kind: str, first: Entry, second: Entry, access: Access) -> None:
        self.findings.append(Finding(kind=kind, first=Operation.of(first), second=Operation.of(second), access=access))


def _accesses(entry: Entry) -> Iterator[tuple[Access, bool]]:
    for accesses, write in ((entry.reads, False), (entry.writes, True)):
        yield from ((access, write) for access in dict.fromkeys(accesses) if access.stop > access.start)


def _place(use: _Use) -> Place:
    owner = use.entry.rank if use.access.rank is None else use.access.rank
    return owner, use.access.alloc


def _overlap(a: Access, b: Access) -> bool:
    return a.start < b.stop and b.start < a.stop


def _common(a: Access, b: Access) -> Access:
    return Access(b.alloc, max(a.start, b.start), min(a.stop, b.stop), b.rank)


def _name(old: _Use, new: _Use) -> tuple[str, Entry, Entry]:
    """(kind, first, second): on one rank the order of submission says which of the two comes too early."""
    for remote, other in ((old, new), (new, old)):
        if remote.write and remote.access.rank is not None and remote.access.rank != remote.entry.rank:
            return "remote-write-in-use", other.entry, remote.entry
    first, second = (old, new) if old.entry.number <= new.entry.number else (new, old)
    if first.write and second.write:
        return "two-writes", first.entry, second.entry
    return ("read-before-write" if first.write else "write-under-read"), first.entry, second.entry

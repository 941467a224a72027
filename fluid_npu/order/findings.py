"""What the checker reports: a kind, the two operations with the Python lines that submitted them, and the bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fluid_npu.order.records import Access, Entry

#: Each kind of finding: what the second operation does wrong.
KINDS = {
    "read-before-write": "reads what the first writes, and nothing makes it wait",
    "write-under-read": "writes what the first reads, and nothing makes it wait",
    "two-writes": "writes what the first writes, and nothing orders the two",
    "remote-write-in-use": "writes into another rank's memory that the first uses, without an acknowledgement",
    "freed-in-flight": "gives memory back that the first may still use",
    "used-after-free": "uses memory that the first gave back",
    "collective-order": "is issued where the other rank issues the first",
    "not-agreed": "finds other than the first what all ranks must find alike",
    "never-ordered": "and the first wait for each other in a circle",
    "empty-wait": "orders nothing",
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One end of a finding."""

    rank: int
    name: str
    stream: str | None
    line: str
    number: int

    @staticmethod
    def of(entry: Entry) -> Operation:
        """The operation of an entry."""
        name = entry.name or {"free": f"free of allocation {entry.alloc}"}.get(entry.kind, entry.kind)
        if entry.label:
            name = f"{name} ({entry.label})"
        return Operation(rank=entry.rank, name=name, stream=entry.stream, line=entry.line, number=entry.number)

    def __str__(self) -> str:
        where = f" on {self.stream}" if self.stream else ""
        return f"rank {self.rank}: {self.name}{where}, submitted at {self.line or '(no Python line)'}"

    @property
    def place(self) -> tuple[str, str]:
        """What stays the same when the program does this again."""
        return self.name, self.line


@dataclass(kw_only=True)
class Finding:
    """``second`` is the operation that comes too early; ``first`` is the one that it should come after."""

    kind: str
    first: Operation
    second: Operation
    access: Access | None = None
    detail: str = ""
    count: int = field(default=1, compare=False)

    def __str__(self) -> str:
        lines = [f"{self.kind}: the second {KINDS[self.kind]}", f"  first:  {self.first}", f"  second: {self.second}"]
        if self.access is not None:
            start, stop, alloc = self.access.start, self.access.stop, self.access.alloc
            lines.append(f"  bytes:  [{start}, {stop}) of allocation {alloc}")
        if self.detail:
            lines.append(f"  {self.detail}")
        if self.count > 1:
            lines.append(f"  and {self.count - 1} more like it")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        ends = {name: vars(end) for name, end in (("first", self.first), ("second", self.second))}
        access = None if self.access is None else self.access._asdict()
        return {"kind": self.kind, **ends, "access": access, "detail": self.detail, "count": self.count}


def merged(findings: list[Finding]) -> list[Finding]:
    """One finding for each kind and pair of places, with its count; the order of the first ones is kept."""
    found: dict[Any, Finding] = {}
    for finding in findings:
        key = (finding.kind, finding.first.place, finding.second.place)
        if key in found:
            found[key].count += finding.count
        else:
            found[key] = finding
    return list(found.values())

"""What was submitted, in order: one JSON line an entry, one file a process.

The *kind* of an entry says which of its fields mean something:

    process     rank, name (what made the record)
    group       group, ranks: a process group, before its first collective
    alloc       alloc, size, stream: fresh memory; a stream that owns it may use it again in its own order
    free        alloc, streams: nobody holds it any more; `streams` are those that the allocator was told of
    op          name, stream, reads, writes: a kernel, a copy, or (stream "host") work of the host itself
    collective  name, group, label, stream, after, reads, writes, sends, receives: this rank's part; `stream` None is
                a helper of its own, `after` is the stream whose work it waits for before it starts
    landed      of, stream: `stream` goes on only when the collective with the number `of` has ended
    record      event, stream: the event marks what was submitted to the stream so far
    wait        event, stream: the stream goes on only when the event has happened
    sync        event, stream or device (one of them): the host goes on only when it has happened or is idle
    signal      event, stream: tells other ranks, when the stream comes there
    wrote       of, writes: what the op with that number, which said only that it reads, has in fact written
    await       event, stream: goes on after the signal of that name with the same count, from any rank
    agreed      event, name: what this rank found about something that all ranks must find alike

Streams are names such as "npu:0/3"; what is before the "/" is the device. The stream "host" is the program's own order:
autograd's threads belong to it, because backward() waits for them. `line` is the Python line that submitted the entry,
`at` and `until` are seconds of the host's clock around the call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

HOST = "host"
KINDS = frozenset(
    ("process", "group", "alloc", "free", "op", "wrote", "collective", "landed", "record", "wait", "sync", "signal")
    + ("await", "agreed")
)


class Access(NamedTuple):
    """Bytes [start, stop) of an allocation; `rank` is None for the process's own memory, else the owner's."""

    alloc: int | str
    start: int
    stop: int
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line. Which fields mean something depends on ``kind``, see the module."""

    kind: str
    number: int = 0
    rank: int = 0
    name: str = ""
    line: str = ""
    stream: str | None = None
    after: str | None = None
    streams: tuple[str, ...] = ()
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    event: str | None = None
    device: str | None = None
    alloc: int | str | None = None
    size: int = 0
    of: int | None = None
    group: str | None = None
    ranks: tuple[int, ...] = ()
    label: str = ""
    sends: tuple[int, ...] | None = None
    receives: tuple[int, ...] | None = None
    at: float = 0.0
    until: float = 0.0

    def as_json(self) -> str:
        """One line; fields that say nothing are left out."""
        return json.dumps({name: value for name, value in _values(self) if value != _DEFAULTS[name]})


_DEFAULTS = {item.name: None if item.default is MISSING else item.default for item in fields(Entry)}
_TUPLES = ("streams", "ranks", "sends", "receives")


def _values(entry: Entry) -> list[tuple[str, Any]]:
    return [(name, getattr(entry, name)) for name in _DEFAULTS]


class RecordError(ValueError):
    """A record cannot be read; the message names the file and the line."""


def parse(line: str, where: str) -> Entry:
    """The entry of one line; RecordError names ``where`` it was."""
    try:
        values = json.loads(line)
        for name in _TUPLES:
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        for name in ("reads", "writes"):
            values[name] = tuple(Access(*item) for item in values.get(name, ()))
        entry = Entry(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{where}: not an entry of an order record ({error})") from error
    if entry.kind not in KINDS:
        raise RecordError(f"{where}: kind {entry.kind!r} is unknown; allowed are {', '.join(sorted(KINDS))}")
    return entry


def write(path: Path, entries: Iterable[Entry]) -> None:
    """One file of one process."""
    path.write_text("".join(f"{entry.as_json()}\n" for entry in entries), encoding="utf-8")


def read_file(path: Path) -> list[Entry]:
    """The entries of one process in the order of submission. Raises RecordError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = [parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
    if not entries or entries[0].kind != "process":
        raise RecordError(f"{path}: the first line must be of kind 'process' and name the rank")
    return _with_writes(numbered(entries, entries[0].rank))


def _with_writes(entries: Sequence[Entry]) -> list[Entry]:
    """Each "wrote" put into its operation."""
    written = {entry.of: entry.writes for entry in entries if entry.kind == "wrote"}
    found = []
    for entry in entries:
        writes = written.get(entry.number, ())
        if writes:
            reads = tuple(access for access in entry.reads if access not in writes)
            entry = replace(entry, reads=reads, writes=(*entry.writes, *writes))
        if entry.kind != "wrote":
            found.append(entry)
    return found


def numbered(entries: Sequence[Entry], rank: int) -> list[Entry]:
    """The entries with this rank, and with their place as number where they have none."""
    return [replace(entry, rank=rank, number=entry.number or place) for place, entry in enumerate(entries, 1)]


def read_folder(folder: Path) -> dict[int, list[Entry]]:
    """The records of all ranks below a folder. Raises RecordError when there is none, or two for one rank."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise RecordError(f"{folder}: no *.jsonl in it; record with OrderRecorder or `fluid-npu sim exec --order DIR`")
    ranks: dict[int, list[Entry]] = {}
    for path in paths:
        entries = read_file(path)
        if entries[0].rank in ranks:
            raise RecordError(f"{path}: rank {entries[0].rank} has two records here; give each run its own folder")
        ranks[entries[0].rank] = entries
    return ranks

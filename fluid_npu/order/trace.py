"""A record as a Chrome trace: a process for each rank, a lane for each stream, host times of submission.

Work of a stream has no times of its own in a record: a lane shows when the host submitted it. A collective that was
waited for is shown from its launch to the end of the wait.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluid_npu.order.records import HOST, Entry

_MICRO = 1e6


def events(ranks: Mapping[int, Sequence[Entry]]) -> list[dict[str, Any]]:
    """The list ``traceEvents``: complete events in microseconds of the host's clock."""
    return [event for rank, entries in sorted(ranks.items()) for event in _of_rank(rank, entries)]


def write_trace(path: Path, ranks: Mapping[int, Sequence[Entry]]) -> None:
    """A file for chrome://tracing or Perfetto."""
    path.write_text(json.dumps({"traceEvents": events(ranks)}), encoding="utf-8")


def _of_rank(rank: int, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    landed = {entry.of: entry.until for entry in entries if entry.kind == "landed"}
    lanes: dict[str, int] = {}
    found = []
    for entry in entries:
        if entry.kind not in ("op", "collective", "landed", "sync"):
            continue
        own = "collectives" if entry.kind == "collective" else HOST
        lane = lanes.setdefault(entry.stream or own, len(lanes))
        until = landed.get(entry.number, entry.until) if entry.kind == "collective" else entry.until
        found.append(_event(entry, rank, lane, until))
    names = [_name("process_name", rank, 0, f"rank {rank}")]
    names += [_name("thread_name", rank, lane, stream) for stream, lane in lanes.items()]
    return names + found


def _event(entry: Entry, rank: int, lane: int, until: float) -> dict[str, Any]:
    name = entry.label or entry.name or entry.kind
    times = {"ts": entry.at * _MICRO, "dur": max(0.0, until - entry.at) * _MICRO}
    return {"name": name, "ph": "X", "pid": rank, "tid": lane, **times, "args": {"line": entry.line}}


def _name(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": lane, "args": {"name": name}}

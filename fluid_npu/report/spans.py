"""Stretches of time on lanes, from any result that has times: what timelines and traces are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fluid_npu.report.sources import Source

COMPUTE, COMMUNICATION = "compute", "communication"


@dataclass(frozen=True, kw_only=True)
class Span:
    """Milliseconds from the start of the record; ``detail`` is shown on a click in a trace."""

    rank: int
    lane: str
    name: str
    start_ms: float
    end_ms: float
    detail: dict[str, Any] = field(default_factory=dict)


def spans_of(source: Source) -> dict[str, list[Span]]:
    """Title to spans; empty where a result has no times. A missing key raises KeyError."""
    if source.kind == "bench":
        return _of_bench(source.data.get("lanes", []))
    if source.kind == "run":
        steps = _by_title((f"step{one['step']}-{one['kind']}", one) for one in source.data["lanes"])
        return {"run": _of_run(source.data["rows"]), **steps}
    return {"order": _of_order(source.data)}


def _of_bench(lanes: Iterable[dict[str, Any]]) -> dict[str, list[Span]]:
    """One step for each workload and kind."""
    return _by_title((f"{one['workload']}-{one['kind']}", one) for one in lanes)


def _by_title(lanes: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = defaultdict(list)
    names = ("rank", "lane", "name", "start_ms", "end_ms")
    for title, one in lanes:
        found[title].append(Span(**{name: one[name] for name in names}))
    return dict(found)


def _of_run(rows: Iterable[dict[str, Any]]) -> list[Span]:
    """Steps one after the other: a run records how long each took, not when it began."""
    found, now = [], 0.0
    for row in rows:
        end = now + row["step_ms"]
        kind = "serialised twin" if row.get("twin") else "step"
        detail = {name: row.get(name) for name in ("loss", "grad_norm", "lr", "a2a_ms", "tokens_per_s")}
        found.append(Span(rank=0, lane="steps", name=f"{kind} {row['step']}", start_ms=now, end_ms=end, detail=detail))
        now = end
    return found


def _of_order(ranks: dict[int, list[dict[str, Any]]]) -> list[Span]:
    """Work in the order of its submission; a collective lasts until the end of the wait for it."""
    timed = [entry for entries in ranks.values() for entry in entries if entry.get("until", 0.0) > 0.0]
    origin = min((entry["at"] for entry in timed), default=0.0)
    return [span for rank, entries in sorted(ranks.items()) for span in _of_rank(rank, entries, origin)]


def _of_rank(rank: int, entries: list[dict[str, Any]], origin: float) -> list[Span]:
    landed = {entry["of"]: entry.get("until", 0.0) for entry in entries if entry["kind"] == "landed"}
    found = []
    for entry in entries:
        if entry["kind"] not in ("op", "collective", "sync") or not entry.get("until"):
            continue
        collective = entry["kind"] == "collective"
        until = landed.get(entry.get("number"), entry["until"]) if collective else entry["until"]
        found.append(
            Span(
                rank=rank,
                lane=COMMUNICATION if collective else entry.get("stream") or "host",
                name=entry.get("label") or entry.get("name") or entry["kind"],
                start_ms=1e3 * (entry["at"] - origin),
                end_ms=1e3 * (max(until, entry["at"]) - origin),
                detail={"line": entry["line"]} if entry.get("line") else {},
            )
        )
    return found

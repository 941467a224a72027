"""Checks the records of a job: ``check(read_folder(path))``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluid_npu.order.collectives import check_agreements, check_collectives
from fluid_npu.order.findings import Finding, Operation, merged
from fluid_npu.order.graph import Clock
from fluid_npu.order.hazards import Hazards
from fluid_npu.order.records import Entry
from fluid_npu.order.timeline import Timeline, build


@dataclass(frozen=True, kw_only=True)
class Report:
    """``findings`` are errors. ``redundant`` are lines whose waits, all of them, added no order to this record."""

    findings: list[Finding]
    redundant: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        found = [finding.as_dict() for finding in self.findings]
        return {"clean": self.clean, "findings": found, "redundant": self.redundant, "counts": self.counts}


def check(ranks: Mapping[int, Sequence[Entry]]) -> Report:
    """All findings in the records of all ranks, each kind and pair of places once."""
    findings = check_collectives(ranks) + check_agreements(ranks)
    timeline = build(ranks)
    order = timeline.graph.order()
    clocks = timeline.graph.clocks(order)
    findings += [_empty_wait(entry, why) for entry, why in timeline.notes]
    findings += _circle(timeline, ranks, set(order))
    hazards = Hazards(timeline, clocks)
    starts = {timeline.spans[entry.rank, entry.number].start: entry for entry in _touching(ranks)}
    for node in order:
        if node in starts:
            hazards.visit(starts[node])
    counts: dict[str, int] = defaultdict(int)
    for entries in ranks.values():
        for entry in entries:
            counts[entry.kind] += 1
    return Report(
        findings=merged(findings + hazards.findings), redundant=_redundant(timeline, clocks), counts=dict(counts)
    )


def _touching(ranks: Mapping[int, Sequence[Entry]]) -> list[Entry]:
    return [entry for entries in ranks.values() for entry in entries if entry.kind in ("op", "collective", "free")]


def _empty_wait(entry: Entry, why: str) -> Finding:
    return Finding(kind="empty-wait", first=Operation.of(entry), second=Operation.of(entry), detail=why)


def _circle(timeline: Timeline, ranks: Mapping[int, Sequence[Entry]], reached: set[int]) -> list[Finding]:
    """One finding when operations wait for each other: what comes first on two of the ranks that are stuck."""
    if len(reached) == len(timeline.graph.before):
        return []
    stuck: dict[int, Entry] = {}
    for entry in _touching(ranks):
        span = timeline.spans[entry.rank, entry.number]
        if span.end not in reached:
            stuck.setdefault(entry.rank, entry)
    entries = list(stuck.values()) or [entry for entry, _, _ in timeline.waits[:1]]
    if not entries:
        return []
    return [Finding(kind="never-ordered", first=Operation.of(entries[0]), second=Operation.of(entries[-1]))]


def _redundant(timeline: Timeline, clocks: list[Clock]) -> list[str]:
    """Lines all of whose waits were for what was ordered already."""
    useful: dict[str, bool] = defaultdict(bool)
    for entry, own, waited in timeline.waits:
        known: Clock = {}
        for node in own:
            for chain, place in clocks[node].items():
                known[chain] = max(known.get(chain, 0), place)
        new = any(known.get(chain, 0) < place for node in waited for chain, place in clocks[node].items())
        useful[f"{entry.kind} at {entry.line}"] |= new
    return sorted(line for line, was in useful.items() if not was)

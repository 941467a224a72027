"""What ranks must do and find alike: collectives in the same order on every rank of a group, and on two ranks in all
groups of both; and what they agree on without one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations, zip_longest

from fluid_npu.order.findings import Finding, Operation
from fluid_npu.order.records import Entry

#: They touch their own buffers and are in no order with other ranks' calls. The last three are names of HCCL.
POINT_TO_POINT = ("send", "recv", "recv_anysource", "HcclSend", "HcclRecv", "HcclBatchSendRecv")


def check_collectives(ranks: Mapping[int, Sequence[Entry]]) -> list[Finding]:
    """The first difference of each pair of ranks: another collective, another group, or sizes that do not fit."""
    members: dict[str, tuple[int, ...]] = {}
    issued: dict[int, list[Entry]] = defaultdict(list)
    for rank, entries in ranks.items():
        for entry in entries:
            if entry.kind == "group":
                members[str(entry.group)] = entry.ranks
            elif entry.kind == "collective" and entry.name not in POINT_TO_POINT:
                issued[rank].append(entry)
    findings = []
    for one, other in combinations(sorted(ranks), 2):
        both = [group for group, inside in members.items() if one in inside and other in inside]
        mine, theirs = ([entry for entry in issued[rank] if entry.group in both] for rank in (one, other))
        findings += _first_difference(mine, theirs, members)
    return findings


def check_agreements(ranks: Mapping[int, Sequence[Entry]]) -> list[Finding]:
    """Each event of which two ranks have found something else: the first two that differ."""
    found: dict[str, Entry] = {}
    findings: dict[str, Finding] = {}
    for entry in (entry for rank in sorted(ranks) for entry in ranks[rank] if entry.kind == "agreed"):
        first = found.setdefault(str(entry.event), entry)
        if first.name != entry.name:
            ends, detail = (Operation.of(first), Operation.of(entry)), f"{entry.event}: {first.name} and {entry.name}"
            findings.setdefault(
                str(entry.event), Finding(kind="not-agreed", first=ends[0], second=ends[1], detail=detail)
            )
    return list(findings.values())


def _first_difference(
    mine: Sequence[Entry], theirs: Sequence[Entry], members: Mapping[str, tuple[int, ...]]
) -> list[Finding]:
    for place, (a, b) in enumerate(zip_longest(mine, theirs), 1):
        if a is None or b is None:
            left, others = (a, mine) if b is None else (b, theirs)
            assert left is not None
            alone = f"the {place}. collective of the two ranks; the other rank ended after {place - 1}"
            last = theirs[-1] if others is mine and theirs else (mine[-1] if others is theirs and mine else left)
            return [_finding(last, left, alone)]
        why = _difference(a, b, members[str(a.group)])
        if why:
            return [_finding(a, b, f"the {place}. collective of the two ranks: {why}")]
    return []


def _finding(first: Entry, second: Entry, detail: str) -> Finding:
    return Finding(kind="collective-order", first=Operation.of(first), second=Operation.of(second), detail=detail)


def _difference(a: Entry, b: Entry, members: Sequence[int]) -> str:
    """Why these two cannot be one collective; empty when they can."""
    for what in ("group", "name", "label"):
        if getattr(a, what) != getattr(b, what):
            return f"{what} {getattr(a, what)!r} and {getattr(b, what)!r}"
    for source, target in ((a, b), (b, a)):
        if source.sends is None or target.receives is None:
            continue
        sent, taken = source.sends[members.index(target.rank)], target.receives[members.index(source.rank)]
        if sent != taken:
            return f"rank {source.rank} sends {sent} bytes where rank {target.rank} expects {taken}"
    return ""

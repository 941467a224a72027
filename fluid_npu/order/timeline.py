"""From the entries of all ranks to the graph: which nodes each operation has and what comes before them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fluid_npu.order.collectives import POINT_TO_POINT
from fluid_npu.order.graph import Graph, Span
from fluid_npu.order.records import HOST, Entry


@dataclass
class Timeline:
    """The graph with the entries that it was made from.

    ``spans`` are the operations that touch memory and the frees, by (rank, number). ``waits`` are the entries that
    only order, with the node that they made and the nodes that they waited for. ``notes`` are entries that make no
    sense, with the reason.
    """

    graph: Graph = field(default_factory=Graph)
    spans: dict[tuple[int, int], Span] = field(default_factory=dict)
    waits: list[tuple[Entry, list[int], list[int]]] = field(default_factory=list)
    notes: list[tuple[Entry, str]] = field(default_factory=list)


def build(ranks: Mapping[int, Sequence[Entry]]) -> Timeline:
    """The timeline of all ranks, the edges between them included."""
    timeline = Timeline()
    signals: dict[tuple[str, int], int] = {}
    awaits: list[tuple[Entry, tuple[str, int], int]] = []
    parts: dict[tuple[str, int], dict[int, tuple[Entry, Span]]] = defaultdict(dict)
    members: dict[str, tuple[int, ...]] = {}
    for rank in sorted(ranks):
        walk = _Walk(rank, timeline)
        for entry in ranks[rank]:
            walk.take(entry)
        signals.update(walk.signals)
        awaits += walk.awaits
        members.update(walk.members)
        for key, part in walk.collectives:
            parts[key][rank] = part
    for entry, key, node in awaits:
        if key in signals:
            timeline.graph.before[node].append(signals[key])
        else:
            timeline.notes.append((entry, f"nobody signals {key[0]!r} for the {key[1]}. time"))
    for (group, _), by_rank in parts.items():
        _join_ranks(timeline.graph, members.get(group, ()), by_rank)
    return timeline


def _join_ranks(graph: Graph, members: Sequence[int], by_rank: Mapping[int, tuple[Entry, Span]]) -> None:
    """A rank's part ends after the ranks that it hears from have started theirs."""
    for rank, (entry, span) in by_rank.items():
        for other, (_, theirs) in by_rank.items():
            if other == rank:
                continue
            heard = entry.receives
            if heard is None or other not in members or heard[members.index(other)]:
                graph.before[span.end].append(theirs.start)


class _Walk:
    """One rank's entries in order. Holds the last node of each stream, of the host, and of each event."""

    def __init__(self, rank: int, timeline: Timeline) -> None:
        self.rank = rank
        self.timeline = timeline
        self.graph = timeline.graph
        self.signals: dict[tuple[str, int], int] = {}
        self.awaits: list[tuple[Entry, tuple[str, int], int]] = []
        self.members: dict[str, tuple[int, ...]] = {}
        self.collectives: list[tuple[tuple[str, int], tuple[Entry, Span]]] = []
        self._last: dict[str, int] = {}
        self._events: dict[str, list[int]] = {}
        self._owner: dict[int | str, str | None] = {}
        self._ends: dict[int, int] = {}
        self._lanes = _Lanes()
        self._counts: dict[tuple[str, str], int] = defaultdict(int)
        self._actions: dict[str, Callable[[Entry], None]] = {
            "process": lambda entry: None,
            "group": self._group,
            "alloc": self._alloc,
            "free": self._free,
            "op": self._op,
            "collective": self._collective,
            "landed": self._landed,
            "record": self._record,
            "wait": self._wait,
            "sync": self._sync,
            "signal": self._signal,
            "await": self._await,
            "agreed": lambda entry: None,
        }

    def take(self, entry: Entry) -> None:
        """Adds one entry."""
        self._actions[entry.kind](entry)

    def _upto(self, *streams: str | None) -> list[int]:
        """What is known to have been submitted to these streams, and what the host knows."""
        names = dict.fromkeys(name for name in (*streams, HOST) if name is not None)
        return [self._last[name] for name in names if name in self._last]

    def _node(self, entry: Entry, stream: str, before: Sequence[int]) -> int:
        node = self.graph.add((self.rank, stream), before, (entry.number, self.rank))
        self._last[stream] = node
        return node

    def _group(self, entry: Entry) -> None:
        self.members[str(entry.group)] = entry.ranks

    def _alloc(self, entry: Entry) -> None:
        assert entry.alloc is not None
        self._owner[entry.alloc] = entry.stream

    def _free(self, entry: Entry) -> None:
        owner = self._owner.pop(entry.alloc, None) if entry.alloc is not None else None
        before = self._upto(owner, *entry.streams)
        node = self.graph.add(None, before, (entry.number, self.rank))
        self.timeline.spans[self.rank, entry.number] = Span(start=node, end=node)

    def _op(self, entry: Entry) -> None:
        stream = entry.stream or HOST
        node = self._node(entry, stream, self._upto(stream))
        self.timeline.spans[self.rank, entry.number] = Span(start=node, end=node)

    def _collective(self, entry: Entry) -> None:
        lane = entry.stream
        before = self._upto(lane, entry.after)
        if lane is None:
            lane = self._lanes.take(entry.number)
            before += [self._last[lane]] if lane in self._last else []
        start = self._node(entry, lane, before)
        end = self._node(entry, lane, [start])
        span = Span(start=start, end=end)
        self.timeline.spans[self.rank, entry.number] = span
        self._ends[entry.number] = end
        kind = "p2p" if entry.name in POINT_TO_POINT else ""
        count = self._counts[str(entry.group), kind]
        self._counts[str(entry.group), kind] += 1
        if not kind:
            self.collectives.append(((str(entry.group), count), (entry, span)))

    def _landed(self, entry: Entry) -> None:
        end = self._ends.get(entry.of) if entry.of is not None else None
        if end is None:
            self.timeline.notes.append((entry, f"no collective has the number {entry.of}"))
            return
        stream = entry.stream or HOST
        self._ordering(entry, stream, [end])
        if stream == HOST and entry.of is not None:
            self._lanes.give_back(entry.of)

    def _record(self, entry: Entry) -> None:
        self._events[str(entry.event)] = self._upto(entry.stream)

    def _wait(self, entry: Entry) -> None:
        # As on the hardware: a wait for an event that was never recorded waits for nothing.
        if entry.event not in self._events:
            self.timeline.notes.append((entry, "waits for an event that was never recorded: that waits for nothing"))
        self._ordering(entry, entry.stream or HOST, self._events.get(str(entry.event), []))

    def _sync(self, entry: Entry) -> None:
        if entry.event is not None:
            waited = self._events.get(entry.event, [])
        elif entry.stream is not None:
            waited = self._upto(entry.stream)
        else:
            waited = [node for name, node in self._last.items() if _on_device(name, entry.device)]
        self._ordering(entry, HOST, waited)

    def _ordering(self, entry: Entry, stream: str, waited: Sequence[int]) -> None:
        own = self._upto(stream)
        self._node(entry, stream, [*own, *waited])
        self.timeline.waits.append((entry, own, list(waited)))

    def _signal(self, entry: Entry) -> None:
        stream = entry.stream or HOST
        self.signals[self._next(entry)] = self._node(entry, stream, self._upto(stream))

    def _await(self, entry: Entry) -> None:
        stream = entry.stream or HOST
        self.awaits.append((entry, self._next(entry), self._node(entry, stream, self._upto(stream))))

    def _next(self, entry: Entry) -> tuple[str, int]:
        """A signal's name and how often it was used in this direction."""
        key = (str(entry.event), entry.kind)
        self._counts[key] += 1
        return str(entry.event), self._counts[key]


def _on_device(stream: str, device: str | None) -> bool:
    return stream != HOST and (device is None or stream.partition("/")[0] == device)


class _Lanes:
    """Chains for collectives without a stream. One that the host has waited for is free for a later collective."""

    def __init__(self) -> None:
        self._free: list[str] = []
        self._names = _names()
        self._taken: dict[int, str] = {}

    def take(self, number: int) -> str:
        lane = self._free.pop() if self._free else next(self._names)
        self._taken[number] = lane
        return lane

    def give_back(self, number: int) -> None:
        lane = self._taken.pop(number, None)
        if lane is not None:
            self._free.append(lane)


def _names() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"collective/{number}"

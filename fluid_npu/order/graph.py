"""The happens-before relation of a record as a graph, and vector clocks on it.

A *chain* is what runs in order by itself: a stream, the host's program, one collective of a backend without streams. An
operation starts at one node and ends at another (the same, unless it is a collective, which ends when the ranks that it
hears from have started theirs). One operation happens before another when the other's start knows of its end.

What is an edge: order of submission to one stream; a launch after what the host knows to have ended; event waits;
synchronisations; collectives; signals. Nothing else: not that the host submitted one thing before another, not what a
simulator happens to do one after the other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

Clock = dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where an operation starts and ends."""

    start: int
    end: int


@dataclass
class Graph:
    """Nodes with their predecessors. A node without a chain orders nothing by itself: it only knows."""

    chain_of: list[int | None] = field(default_factory=list)
    place_of: list[int] = field(default_factory=list)
    before: list[list[int]] = field(default_factory=list)
    when: list[tuple[int, int]] = field(default_factory=list)
    _chains: dict[object, int] = field(default_factory=dict)
    _lengths: list[int] = field(default_factory=list)

    def add(self, chain: object | None, before: Sequence[int], when: tuple[int, int]) -> int:
        """A node at the end of a chain, after the nodes ``before``; ``when`` breaks ties in ``order``.

        The caller names the chain's own last node among ``before``.
        """
        node = len(self.chain_of)
        index = None
        place = 0
        if chain is not None:
            index = self._chains.setdefault(chain, len(self._chains))
            if index == len(self._lengths):
                self._lengths.append(0)
            self._lengths[index] += 1
            place = self._lengths[index]
        self.chain_of.append(index)
        self.place_of.append(place)
        self.before.append(list(dict.fromkeys(before)))
        self.when.append(when)
        return node

    def order(self) -> list[int]:
        """The nodes so that each comes after those before it; nodes on a circle are left out."""
        after: list[list[int]] = [[] for _ in self.before]
        missing = [len(nodes) for nodes in self.before]
        for node, nodes in enumerate(self.before):
            for earlier in nodes:
                after[earlier].append(node)
        free = [(self.when[node], node) for node, count in enumerate(missing) if not count]
        heapq.heapify(free)
        found = []
        while free:
            node = heapq.heappop(free)[1]
            found.append(node)
            for later in after[node]:
                missing[later] -= 1
                if not missing[later]:
                    heapq.heappush(free, (self.when[later], later))
        return found

    def clocks(self, order: Sequence[int]) -> list[Clock]:
        """For each node: how far it knows each chain to have come, itself included."""
        clocks: list[Clock] = [{} for _ in self.before]
        for node in order:
            known = clocks[node]
            for earlier in self.before[node]:
                _join(known, clocks[earlier])
            chain = self.chain_of[node]
            if chain is not None:
                known[chain] = self.place_of[node]
        return clocks

    def knows(self, clock: Clock, node: int) -> bool:
        """Whether a clock has seen a node of a chain."""
        chain = self.chain_of[node]
        assert chain is not None
        return clock.get(chain, 0) >= self.place_of[node]


def _join(known: Clock, other: Clock) -> None:
    for chain, place in other.items():
        if known.get(chain, 0) < place:
            known[chain] = place

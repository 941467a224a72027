"""What each rank sends and receives in an AllToAll that goes in two legs: between nodes, and inside them.

Rank p of the group is at place p modulo M of node p // M. Between nodes only ranks of equal place exchange rows, so
each network card talks to the cards of its own rail, in N - 1 messages and not in (N - 1) M.

*Across first*: a row goes to the rank of the sender's place on the target's node, then inside that node to the target.
*Inside first*: a row goes inside the sender's node to the rank of the target's place, then across to the target.

Both move every row at most once over the network and at most once inside a node, straight from the sender's rows and
into the target's: between the legs rows wait in one buffer (``middle``) in the order in which the second leg sends
them, and rows that need one leg alone wait nowhere. What differs is whose card carries a row: across first the sender's
place, inside first the target's. So across first spreads what is for one hot rank over all cards of its node; inside
first spreads what one hot rank sends, which is the same exchange backwards. The order is taken from the table, which is
the same on all ranks: the one whose busiest card has less to carry, else across first, because the network is the
longer leg and begins at once.

N nodes, M ranks of a node, P = N M ranks; ``table`` is [source][target] rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np

from fluid_npu.comm.transports.base import Table
from fluid_npu.comm.transports.nodes import Nodes

Order = Literal["across first", "inside first"]
Where = Literal["source", "middle", "output"]


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + rows) of a buffer, to or from a rank of the group."""

    buffer: Where
    start: int
    rows: int
    peer: int


@dataclass(frozen=True)
class Copy:
    """Rows that this rank moves by itself, from piece to piece; ``peer`` means nothing."""

    source: Piece
    target: Piece


@dataclass
class Leg:
    """One rank's messages, those of a pair in the same order at both ends."""

    sends: list[Piece] = field(default_factory=list)
    receives: list[Piece] = field(default_factory=list)


@dataclass
class TwoLegs:
    """One rank's part of an exchange."""

    order: Order
    first: Leg = field(default_factory=Leg)
    second: Leg = field(default_factory=Leg)
    before: list[Copy] = field(default_factory=list)
    """Own rows, which need no message: copied at the start."""
    after: list[Copy] = field(default_factory=list)
    """Own rows that come by the first leg: copied at the end."""
    middle_rows: int = 0

    def rows_sent(self, own: int, nodes: Nodes) -> tuple[int, int]:
        """To other ranks of this node, and to other nodes; in both legs."""
        inside = across = 0
        for piece in (*self.first.sends, *self.second.sends):
            if piece.peer // nodes.size == own // nodes.size:
                inside += piece.rows
            else:
                across += piece.rows
        return inside, across


def plan_legs(table: Table, nodes: Nodes, own: int, order: Order | None = None) -> TwoLegs:
    """The part of rank ``own``; ``order`` None takes the one that the table asks for."""
    chosen = order if order is not None else better_order(table, nodes)
    planner = _Planner(table, nodes, own, TwoLegs(order=chosen))
    return planner.across_first() if chosen == "across first" else planner.inside_first()


def better_order(table: Table, nodes: Nodes) -> Order:
    """The order in which the busiest network card has less to carry; the same on all ranks."""
    count, size = nodes.count, nodes.size
    rows = np.array(table, dtype=np.int64).reshape(count, size, count, size)
    rows[range(count), :, range(count)] = 0  # what stays on a node uses no card
    # [node, place, node]: what the card of a place carries from one node to another.
    across, inside = (_busiest(carried) for carried in (rows.sum(3), rows.sum(1).transpose(0, 2, 1)))
    return "inside first" if inside < across else "across first"


def _busiest(rows: np.ndarray) -> int:
    """The most that a card sends or receives."""
    return int(max(rows.sum(2).max(), rows.sum(0).max()))


class _Planner:
    """Where everything lies: n, m are nodes, a, b places; ``own`` is at place ``place`` of node ``node``."""

    def __init__(self, table: Table, nodes: Nodes, own: int, legs: TwoLegs) -> None:
        self.table = table
        self.size = nodes.size
        self.own = own
        self.node, self.place = divmod(own, nodes.size)
        self.legs = legs
        self.others = [node for node in range(nodes.count) if node != self.node]
        self.here = range(self.node * self.size, (self.node + 1) * self.size)
        #: Where the rows for each rank begin in the source, and those of each rank in the output.
        self.sent_at = [0, *accumulate(table[own])]
        self.got_at = [0, *accumulate(row[own] for row in table)]

    def ranks(self, node: int) -> range:
        return range(node * self.size, (node + 1) * self.size)

    def source(self, target: int, rows: int, peer: int) -> Piece:
        """Rows from where those for ``target`` begin."""
        return Piece("source", self.sent_at[target], rows, peer)

    def output(self, source: int, rows: int, peer: int) -> Piece:
        return Piece("output", self.got_at[source], rows, peer)

    def middle(self, counts: Iterable[int]) -> list[int]:
        """Where each of consecutive blocks begins, and the end; the buffer is made that large."""
        places = [0, *accumulate(counts)]
        self.legs.middle_rows = places[-1]
        return places

    def keep_own(self) -> None:
        rows = self.table[self.own][self.own]
        copy = Copy(self.source(self.own, rows, self.own), self.output(self.own, rows, self.own))
        self.legs.before.append(copy)

    def across_first(self) -> TwoLegs:
        table, own, first, second = self.table, self.own, self.legs.first, self.legs.second
        rails = [node * self.size + self.place for node in self.others]
        for node, rail in zip(self.others, rails, strict=True):
            targets = self.ranks(node)
            first.sends.append(self.source(targets[0], sum(table[own][target] for target in targets), rail))
        straight = [not any(table[rail][target] for target in self.here if target != own) for rail in rails]
        at = self.middle(
            0 if alone else table[rail][target]
            for rail, alone in zip(rails, straight, strict=True)
            for target in self.here
        )
        for number, rail in enumerate(rails):
            begin, end = at[number * self.size], at[(number + 1) * self.size]
            whole = self.output(rail, table[rail][own], rail) if straight[number] else None
            first.receives.append(whole or Piece("middle", begin, end - begin, rail))
        for peer in self.here:
            if peer != own:  # what stays on the node goes at once
                first.sends.append(self.source(peer, table[own][peer], peer))
                first.receives.append(self.output(peer, table[peer][own], peer))
            for number, rail in enumerate(rails):
                waits = Piece("middle", at[number * self.size + peer % self.size], table[rail][peer], peer)
                origin = rail - self.place + peer % self.size
                if peer != own:
                    second.sends.append(waits)
                    second.receives.append(self.output(origin, table[origin][own], peer))
                elif not straight[number]:
                    self.legs.after.append(Copy(waits, self.output(rail, table[rail][own], own)))
        self.keep_own()
        return self.legs

    def inside_first(self) -> TwoLegs:
        table, own, first, second = self.table, self.own, self.legs.first, self.legs.second
        rails = [node * self.size + self.place for node in self.others]
        straight = [not any(table[source][rail] for source in self.here if source != own) for rail in rails]
        at = self.middle(
            0 if alone else table[source][rail]
            for rail, alone in zip(rails, straight, strict=True)
            for source in self.here
        )
        for peer in self.here:
            if peer != own:
                first.sends.append(self.source(peer, table[own][peer], peer))
                first.receives.append(self.output(peer, table[peer][own], peer))
            for number, rail in enumerate(rails):
                waits = Piece("middle", at[number * self.size + peer % self.size], table[peer][rail], peer)
                target = rail - self.place + peer % self.size
                if peer != own:
                    first.sends.append(self.source(target, table[own][target], peer))
                    first.receives.append(waits)
                elif not straight[number]:
                    self.legs.before.append(Copy(self.source(rail, table[own][rail], own), waits))
        for number, rail in enumerate(rails):
            begin, end = at[number * self.size], at[(number + 1) * self.size]
            whole = self.source(rail, table[own][rail], rail) if straight[number] else None
            second.sends.append(whole or Piece("middle", begin, end - begin, rail))
            origins = self.ranks(rail // self.size)
            rows = sum(table[origin][own] for origin in origins)
            second.receives.append(self.output(origins[0], rows, rail))
        self.keep_own()
        return self.legs

"""Bytes inside a node and across nodes: of an exchange that is one of the two legs of a dispatch by nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

#: Bytes of the two legs, and in plain form: of a step they are there when its exchanges have legs.
LEG_COUNTERS = (
    *("a2a_inside_node_bytes", "a2a_across_nodes_bytes"),
    *("a2a_plain_inside_node_bytes", "a2a_plain_across_nodes_bytes"),
)


class LegBytes(NamedTuple):
    """Of this rank, to other ranks of its node and to other nodes."""

    inside: int
    across: int


_NOTHING = LegBytes(0, 0)


@dataclass(frozen=True, kw_only=True)
class NodeLeg:
    """``plain`` is what the exchange of both legs would send with a row for every (token, expert), there and back; the
    leg across has it, and the leg inside nothing, so that their sum counts it once."""

    inside: bool
    plain: tuple[LegBytes, LegBytes] = (_NOTHING, _NOTHING)

    def sent(self, to_peers: int) -> LegBytes:
        """All of a leg's bytes go one way."""
        return LegBytes(to_peers, 0) if self.inside else LegBytes(0, to_peers)

    def reversed(self) -> NodeLeg:
        """The way back."""
        return NodeLeg(inside=self.inside, plain=(self.plain[1], self.plain[0]))

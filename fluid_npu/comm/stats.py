"""Bytes and milliseconds of the exchanges of one engine.

``a2a_ms`` is the duration of exchanges that were waited for at once (every one with overlap off, those of the
serialised twin otherwise): from launch to completion, so waiting for a late peer is part of it. The duration of
an exchange that compute ran beside is not observable from the host and is not guessed. ``exposed_ms`` is the
time between reaching a wait and passing it. ``a2a_plain_bytes`` is what the same exchanges would send with a row for
every (token, expert): as much as ``a2a_bytes``, unless tokens are sent once per rank. ``a2a_inside_node_bytes`` and
``a2a_across_nodes_bytes`` are there when exchanges go in two legs: a row that takes both is counted in both. Where the
dispatch itself goes by nodes, ``a2a_plain_inside_node_bytes`` and ``a2a_plain_across_nodes_bytes`` are what a row for
every (token, expert) would send, each straight to its rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fluid_npu.device.base import TimingEvent

_FOLD_AT = 2048


@dataclass(frozen=True)
class _Timing:
    comm_type: str
    launched: TimingEvent
    reached: TimingEvent
    passed: TimingEvent
    serialised: bool


class CommStats:
    """Counters that cost no synchronisation while an engine runs; times are resolved when read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything counted so far."""
        self._timings: list[_Timing] = []
        self._counts: Counter[str] = Counter()
        self._ms: Counter[str] = Counter()

    def count(self, comm_type: str, bytes_to_peers: int, plain_bytes: int | None = None) -> None:
        """One exchange was launched: bytes to other ranks, and what they would be in plain form (None: the same)."""
        self._counts["a2a_count"] += 1
        self._counts["a2a_bytes"] += bytes_to_peers
        self._counts["a2a_plain_bytes"] += bytes_to_peers if plain_bytes is None else plain_bytes
        self._counts[f"{comm_type}_bytes"] += bytes_to_peers

    def count_legs(self, leg_bytes: tuple[int, int] | None, plain: tuple[int, int] | None = None) -> None:
        """Bytes that an exchange in two legs sends inside this node, and to other nodes; None: it has one leg.

        ``plain``: what they would be in plain form, where that is known.
        """
        for form, sent in (("", leg_bytes), ("plain_", plain)):
            if sent is not None:
                self._counts[f"a2a_{form}inside_node_bytes"] += sent[0]
                self._counts[f"a2a_{form}across_nodes_bytes"] += sent[1]

    def timed(
        self, comm_type: str, launched: TimingEvent, reached: TimingEvent, passed: TimingEvent, serialised: bool
    ) -> None:
        """Adds the three points of one exchange."""
        self._timings.append(_Timing(comm_type, launched, reached, passed, serialised))
        if len(self._timings) >= _FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        for timing in self._timings:
            self._ms["exposed_ms"] += timing.passed.elapsed_ms(timing.reached)  # type: ignore[assignment]
            if timing.serialised:
                taken = timing.passed.elapsed_ms(timing.launched)
                self._ms["a2a_ms"] += taken  # type: ignore[assignment]
                self._ms[f"{timing.comm_type}_ms"] += taken  # type: ignore[assignment]
        self._timings.clear()

    def as_dict(self) -> dict[str, float]:
        """``a2a_count``, ``a2a_bytes``, ``a2a_plain_bytes``, ``a2a_ms``, ``exposed_ms``; bytes and ms per comm_type."""
        self._fold()
        whole = {"a2a_count": 0, "a2a_bytes": 0, "a2a_plain_bytes": 0}
        zeros: dict[str, float] = {**whole, "a2a_ms": 0.0, "exposed_ms": 0.0}
        return {**zeros, **self._counts, **self._ms}

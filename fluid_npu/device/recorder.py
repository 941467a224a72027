"""A bounded record of what an engine did, in order: launches, waits, dW tasks, collectives.

One record serves the order checks of the tests, the Chrome trace and the hidden-time figures. It belongs to the
object that owns it (a scheduler), never to the module.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """One entry. ``at`` is seconds of ``time.perf_counter`` when the host issued it."""

    kind: str
    name: str
    at: float
    detail: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """Keeps the newest ``limit`` entries while ``enabled``; costs one test of a flag otherwise."""

    def __init__(self, limit: int = 100_000) -> None:
        self.enabled = False
        self._records: deque[Record] = deque(maxlen=limit)

    def add(self, kind: str, name: str, **detail: Any) -> None:
        """Appends an entry stamped with the time of the host."""
        if self.enabled:
            self._records.append(Record(kind, name, time.perf_counter(), detail))

    def take(self) -> list[Record]:
        """The entries so far, oldest first; the record is empty afterwards."""
        records = list(self._records)
        self._records.clear()
        return records

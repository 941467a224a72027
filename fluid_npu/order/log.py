"""The entries of one process while it runs, and which Python line is submitting."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from fluid_npu.order.records import Entry, write

_OWN = os.path.dirname(__file__)


class Log:
    """Appends entries in the order in which the process submits them. Any thread may call; a lock keeps one order."""

    def __init__(self, rank: int, source: str) -> None:
        self.rank = rank
        self.entries: list[Entry] = []
        # Re-entrant: an entry makes objects, and that may free tensors, which are entries too.
        self._lock = threading.RLock()
        self._places: dict[tuple[Any, int], str] = {}
        self.add("process", name=source)

    def add(self, kind: str, *, at: float = 0.0, **values: Any) -> int:
        """One entry, submitted by the line that is running; returns its number. ``at`` is when the call began."""
        now = time.perf_counter()
        line = self._line(sys._getframe(1))
        with self._lock:
            number = len(self.entries) + 1
            values.update(rank=self.rank, number=number, line=line, at=at or now, until=now)
            self.entries.append(Entry(kind=kind, **values))
        return number

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``rankN.jsonl`` into the folder, which is made if it is not there."""
        path = Path(folder) / f"rank{self.rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            write(path, self.entries)
        return path

    def _line(self, frame: FrameType | None) -> str:
        """The innermost line that is neither torch's nor this package's; empty on a thread without one."""
        while frame is not None:
            place = (frame.f_code, frame.f_lineno)
            text = self._places.get(place)
            if text is None:
                text = self._places[place] = _describe(*place)
            if text:
                return text
            frame = frame.f_back
        return ""


def _describe(code: Any, line: int) -> str:
    path = code.co_filename
    if path.startswith((_OWN, "<")) or f"{os.sep}torch{os.sep}" in path or f"{os.sep}torch_npu{os.sep}" in path:
        return ""
    _, _, installed = path.rpartition(f"site-packages{os.sep}")
    short = installed if installed != path else os.path.relpath(path) if path.startswith(os.getcwd()) else path
    return f"{short}:{line} in {code.co_name}"

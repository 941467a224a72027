"""Notices that a peer of a device's copies has gone: a stream that waits for its counter would wait forever.

A thread looks at the oldest exchange under way. When a peer's process has ended, or the exchange lasts longer than the
limit, it lets all waits of this rank's streams pass. What they then copy is rubbish, so the failure is kept, and the
next exchange that is begun or waited for raises it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fluid_npu.comm.transports.shared_files import SharedFile

_LOOK_S = 0.25


class PeerWatch:
    """Of one group's windows. ``release`` lets the waits pass; it is called again until nothing is under way.

    ``enter`` prepares the thread for the device.
    """

    def __init__(
        self, index: int, lives: Sequence[SharedFile], enter: Callable[[], None], release: Callable[[], None]
    ) -> None:
        self.failure = ""
        self.timeout_s = 1800.0
        self._others = [(rank, file) for rank, file in enumerate(lives) if rank != index]
        self._files = lives
        self._enter = enter
        self._release = release
        self._pending: deque[tuple[Any, float]] = deque()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer-copy watch", daemon=True)
        self._thread.start()

    def add(self, end: Any) -> None:
        """An event that happens when an exchange is done."""
        self._pending.append((end, time.monotonic()))

    def check(self) -> None:
        """Raises RuntimeError when a peer has gone."""
        if self.failure:
            raise RuntimeError(self.failure)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()
        for file in self._files:
            file.close()

    def _run(self) -> None:
        self._enter()
        while not self._closed.wait(_LOOK_S):
            while self._pending and self._pending[0][0].query():
                self._pending.popleft()
            if not self._pending:
                continue
            self.failure = self.failure or self._look(time.monotonic() - self._pending[0][1])
            if self.failure:
                self._release()

    def _look(self, waited: float) -> str:
        gone = [rank for rank, file in self._others if not file.owner_lives()]
        if gone:
            return f"peer-copy: connection to rank {gone[0]} of the group lost: its process has ended"
        if waited > self.timeout_s:
            return f"peer-copy: timed out after {waited:.0f} s waiting for the other ranks of the group"
        return ""

"""Heartbeats of all ranks on the job's store: who is alive, who is stuck, and where.

Each process publishes what its ``guard.watch`` shows, every ``interval_s``. When a collective fails, ``blame``
looks at the others' entries twice: a rank whose entry did not move is silent. A thread also ends the process when
one collective lasts longer than the time-out: gloo raises by itself, other backends may hang.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from fluid_npu.comm.guard import default_blame, rank_names, watch

EXIT_RANK_LOST = 4
_PREFIX = "fluid_npu/progress/"


class ProgressBoard:
    """This rank's entry on the store and a reader of the others'.

    Args:
        store: a torch.distributed store that this object alone uses (a client of its own: a blocked call
            elsewhere would hold its lock).
        rank: global rank.
        world: number of ranks.
        interval_s: seconds between heartbeats.
        timeout_s: a collective that lasts longer ends the process with exit code 4; 0 never does.
    """

    def __init__(self, store: Any, rank: int, world: int, *, interval_s: float = 0.5, timeout_s: float = 0.0) -> None:
        self.store = store
        self.rank = rank
        self.world = world
        self.interval_s = interval_s
        self.timeout_s = timeout_s
        self._beats = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> ProgressBoard:
        """Publishes the first entry and starts the thread; ``guard.watch`` blames through this board."""
        self.publish()
        watch.blame = self.blame
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread; the last entry stays on the store."""
        self._stop.set()
        self._thread.join(timeout=2 * self.interval_s)
        watch.blame = default_blame

    def publish(self) -> None:
        """Writes this rank's entry. A store that is gone is not an error here: the collectives will tell."""
        self._beats += 1
        entry = {"beats": self._beats, "time": time.time(), "pid": os.getpid(), "where": watch.where()}
        entry["failure"] = watch.failure
        try:
            with self._lock:
                self.store.set(f"{_PREFIX}{self.rank}", json.dumps(entry))
        except RuntimeError:
            self._stop.set()

    def read(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Entries of those ranks that have one."""
        found = {}
        with self._lock:
            for rank in ranks:
                if self.store.check([f"{_PREFIX}{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{_PREFIX}{rank}"))
        return found

    def blame(self, ranks: Sequence[int]) -> str:
        """Which of the ranks are silent, which have failed and which are elsewhere; takes 2.5 intervals."""
        try:
            before = self.read(ranks)
            for _ in range(5):
                time.sleep(self.interval_s / 2)
                self.publish()  # a rank that looks for the culprit must not look dead itself
            after = self.read(ranks)
        except RuntimeError as error:
            return f"{default_blame(ranks)} (their progress cannot be read: the store is gone, {type(error).__name__})"
        silent = [rank for rank in ranks if after.get(rank, {}).get("beats") == before.get(rank, {}).get("beats")]
        notes = [_note(rank, after.get(rank), silent=rank in silent) for rank in ranks]
        lost = [rank for rank in silent if not after.get(rank, {}).get("failure")]
        return f"waited for {rank_names(lost or list(ranks))}: {'; '.join(notes)}"

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.publish()
            current = watch.current
            if current is None or not current.watched:
                continue
            # gloo raises at the time-out itself; one interval later it is this thread's turn.
            limit = self.timeout_s + self.interval_s
            if self.timeout_s and time.monotonic() - current.started > limit:
                print(current.explain(f"it exceeded --timeout {self.timeout_s:g} s"), file=sys.stderr, flush=True)
                os._exit(EXIT_RANK_LOST)


def _note(rank: int, entry: dict[str, Any] | None, *, silent: bool) -> str:
    if entry is None:
        return f"rank {rank} has never reported"
    if entry["failure"]:
        return f"rank {rank} has stopped by itself ({entry['failure'].partition(';')[0]})"
    if silent:
        age = time.time() - entry["time"]
        return f"rank {rank} (pid {entry['pid']}) has not reported for {age:.1f} s, last seen {entry['where']}"
    return f"rank {rank} is alive, {entry['where']}"

"""A stream on the host: a thread that does what it is given, in order, beside the program.

A step that fails ends the lane: what was given after it is not done, and whoever waits gets the error.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_thread = threading.local()


def on_host_lane() -> bool:
    """Whether the calling thread is a lane's."""
    return getattr(_thread, "is_lane", False)


class Mark:
    """A point in a lane's order."""

    def __init__(self, lane: HostLane) -> None:
        self._lane = lane
        self._reached = threading.Event()

    def set(self) -> None:
        """The lane came here, or gave up."""
        self._reached.set()

    def wait(self) -> None:
        """Returns when the lane has come here. Raises RuntimeError with the cause when it never will."""
        self._reached.wait()
        if self._lane.failure is not None:
            raise RuntimeError(str(self._lane.failure)) from self._lane.failure


class HostLane:
    """``submit`` and ``mark`` may be called from any one thread at a time."""

    def __init__(self, name: str) -> None:
        self.failure: Exception | None = None
        self._steps: queue.SimpleQueue[Callable[[], None] | Mark | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, step: Callable[[], None]) -> None:
        """Does the step after all earlier ones."""
        self._steps.put(step)

    def mark(self) -> Mark:
        """A point after everything submitted so far."""
        mark = Mark(self)
        self._steps.put(mark)
        return mark

    def close(self) -> None:
        """Ends the thread after what was submitted."""
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        _thread.is_lane = True
        while (step := self._steps.get()) is not None:
            if isinstance(step, Mark):
                step.set()
            elif self.failure is None:
                try:
                    step()
                except Exception as error:
                    self.failure = error

"""Names the collective that a process is in, so that a dead or late peer is reported and not just waited for.

    with collective("dispatch-backward AllToAll", ranks=(0, 1), layer=3):
        work.wait()

A torch.distributed failure inside becomes ``CollectiveError`` with the collective, the layer and the ranks waited
for. The cost is about a microsecond, so every AllToAll is wrapped. State belongs to the process, not to a thread:
backward runs on another thread than the forward, and the progress board reads it from a third.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

#: What an NPU's stream reports, at the next synchronisation, when a collective on it waited in vain: CANN's error codes
#: FFTS_PLUS_TIMEOUT, SUSPECT_REMOTE_ERROR and COMM_OP_RETRY_FAIL (acl/error_codes/rt_error_codes.h).
_NPU_PEER_LOST = "507048|507057|507904"
_COMMUNICATION_ERROR = re.compile(
    f"gloo|nccl|hccl|connection|timed out|timeout|socket|broken pipe|tcpstore|{_NPU_PEER_LOST}", re.I
)


class CollectiveError(RuntimeError):
    """A collective could not complete; the message names it, its layer and the ranks waited for."""


def default_blame(ranks: Sequence[int]) -> str:
    """All that is known without a progress board."""
    return f"waited for {rank_names(ranks)}"


def rank_names(ranks: Sequence[int]) -> str:
    """'rank 1' or 'ranks 1, 2'."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks)) or '(none)'}"


@dataclass
class Watch:
    """Where this process is. ``current`` is replaced as a whole: readers on other threads see one or the other."""

    current: collective | None = None
    previous: str = "the start"
    blame: Callable[[Sequence[int]], str] = default_blame
    failure: str = ""
    counter: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def where(self) -> str:
        """One phrase: in which collective and for how long, or which was the last one."""
        current = self.current
        if current is None:
            return f"outside any collective, after {self.previous}"
        return f"in {current.title()} for {time.monotonic() - current.started:.1f} s"


#: This process's watch.
watch = Watch()


class collective:
    """Context manager around one collective, or around a phase that consists of collectives.

    Args:
        name: kind and purpose, such as ``"combine AllToAll"``.
        ranks: global ranks of the group, this one included.
        layer: number of the layer, if it belongs to one.
        watched: False for a phase that also computes, which may last longer than the time-out.
    """

    __slots__ = ("layer", "name", "outer", "ranks", "sequence", "started", "watched")

    def __init__(self, name: str, ranks: Sequence[int], layer: int | None = None, *, watched: bool = True) -> None:
        self.name = name
        self.ranks = ranks
        self.layer = layer
        self.watched = watched
        self.outer: collective | None = None
        self.sequence = 0
        self.started = 0.0

    def title(self) -> str:
        """Name with layer and sequence number."""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.name}{layer} (collective {self.sequence})"

    def __enter__(self) -> collective:
        self.sequence = next(watch.counter)
        self.started = time.monotonic()
        self.outer = watch.current
        watch.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch.current = self.outer
        watch.previous = self.name if self.layer is None else f"{self.name} of layer {self.layer}"
        if isinstance(value, RuntimeError) and not isinstance(value, CollectiveError) and is_communication(value):
            raise CollectiveError(self.explain(str(value))) from value

    def explain(self, cause: str) -> str:
        """The error text: what failed, since when, who was waited for."""
        waited = time.monotonic() - self.started
        me = int(os.environ.get("RANK", "0"))
        others = [rank for rank in self.ranks if rank != me]
        text = f"rank {me}: {self.title()} failed after {waited:.1f} s; {watch.blame(others)}; cause: {one_line(cause)}"
        watch.failure = text
        return text


def is_communication(error: BaseException) -> bool:
    """Whether an error comes from torch.distributed or its transport and not from arithmetic."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or _COMMUNICATION_ERROR.search(str(error)) is not None


def one_line(text: str, limit: int = 200) -> str:
    """First part of a C++ error text, without line ends."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."

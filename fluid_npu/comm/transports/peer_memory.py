"""What an AllToAll by peer copies needs of the hardware: windows, copies, counters that other ranks write.

A *window* is memory of one rank that the others may write: for each other rank a ring of ``slots`` slots of
``slot_bytes``. Beside it lie two counters for each other rank: pieces that have *arrived* from it, and pieces that it
has *freed* of those that this rank sent. Work goes on two *lanes*, which run beside the program and beside each other,
each in the order of submission: the *sending* lane copies into peers' windows, the *receiving* lane out of the own one.
The protocol that uses them is in ``peer_copy.py``. P ranks; a rank is its index in the group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch


class PendingCopies(Protocol):
    """What one exchange has put on the lanes."""

    def wait(self) -> None:
        """The current stream goes on (on a CPU: this returns) when all of it has been done.

        Raises RuntimeError when a peer has gone or did not come within the time limit.
        """


@dataclass(frozen=True, kw_only=True)
class Block:
    """``size`` bytes of a contiguous tensor from byte ``start`` on."""

    tensor: torch.Tensor
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class WindowSize:
    """How much memory each rank gives."""

    slots: int
    slot_bytes: int

    def window_bytes(self, world: int) -> int:
        """Of one rank's window: a ring for each other rank."""
        return (world - 1) * self.slots * self.slot_bytes

    def offset(self, reader: int, writer: int, slot: int, world: int) -> int:
        """Where in the window of ``reader`` a slot of ``writer`` begins."""
        ring = (writer - reader - 1) % world
        return (ring * self.slots + slot) * self.slot_bytes


class PeerMemory(ABC):
    """The windows of a group and the two lanes. Counts are of pieces since the start; they only grow.

    ``name`` is the same on all ranks of the group and that of no other group. ``timeout_s`` is how long a peer is
    waited for.
    """

    def __init__(self, name: str, index: int, world: int, size: WindowSize) -> None:
        self.name = name
        self.index = index
        self.world = world
        self.size = size
        self.timeout_s = 1800.0

    @abstractmethod
    def fork(self) -> None:
        """What is submitted from here on comes after what the current stream was given so far."""

    @abstractmethod
    def put(self, peer: int, slot: int, block: Block) -> None:
        """Sending lane: copies the block into this rank's slot of the peer's window."""

    @abstractmethod
    def tell_arrived(self, peer: int, count: int) -> None:
        """Sending lane: the peer may read the first ``count`` pieces of this rank."""

    @abstractmethod
    def await_freed(self, peer: int, count: int) -> None:
        """Sending lane: goes on when the peer has freed ``count`` pieces of this rank."""

    @abstractmethod
    def await_arrived(self, peer: int, count: int) -> None:
        """Receiving lane: goes on when ``count`` pieces of the peer have arrived."""

    @abstractmethod
    def take(self, peer: int, slot: int, block: Block) -> None:
        """Receiving lane: copies the peer's slot of the own window into the block."""

    @abstractmethod
    def tell_freed(self, peer: int, count: int) -> None:
        """Receiving lane: the peer may overwrite its first ``count`` pieces."""

    @abstractmethod
    def keep(self, source: Block, target: Block) -> None:
        """Receiving lane: copies the rows that stay on this rank."""

    @abstractmethod
    def join(self) -> PendingCopies:
        """Everything since ``fork``."""

    @abstractmethod
    def close(self) -> None:
        """Gives the memory back; nothing may be under way."""

"""What an AllToAll by peer copies needs of the hardware: windows, copies, counters that other ranks write.

A *window* is memory of one rank that the others may write. It has a *ring* of slots for each other rank, and two
*landing areas*, each for all that is received in one exchange. Beside it lie four counters for each other rank.
Work goes on two *lanes*, which run beside the program and beside each other, each in the order of submission: the
*sending* lane copies into peers' windows, the *receiving* lane out of the own one. The protocol that uses them is in
``peer_copy.py``. P ranks; a rank is its index in the group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Protocol

import torch


class Counter(IntEnum):
    """What a rank tells another one; each pair has one of each kind in each direction. Counts only grow."""

    ARRIVED = 0
    """Pieces that the teller has put into the other's ring."""
    FREED = 1
    """Pieces of the other's that the teller has copied out of its ring."""
    LANDED = 2
    """Exchanges whose rows the teller has put into the other's landing area."""
    RELEASED = 3
    """Exchanges whose landing area the teller does not read any more."""


class Lane(Enum):
    """Where a step is done, in the order of submission to it."""

    SENDING = "sending"
    RECEIVING = "receiving"
    PROGRAM = "program"
    """The current stream, or on a CPU at once."""


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


LANDINGS = 2


@dataclass(frozen=True, kw_only=True)
class WindowSize:
    """How much memory each of ``world`` ranks gives: for each peer ``slots`` slots, then ``LANDINGS`` areas."""

    world: int
    slots: int
    slot_bytes: int
    landing_bytes: int

    @property
    def total(self) -> int:
        """Bytes of one rank's window."""
        return self.landing(LANDINGS)

    def slot(self, reader: int, writer: int, slot: int) -> int:
        """Where in the window of ``reader`` a slot of ``writer`` begins."""
        ring = (writer - reader - 1) % self.world
        return (ring * self.slots + slot) * self.slot_bytes

    def landing(self, area: int) -> int:
        """Where in any window a landing area begins."""
        return (self.world - 1) * self.slots * self.slot_bytes + area * self.landing_bytes


class PeerMemory(ABC):
    """The windows of a group and the two lanes.

    ``name`` is the same on all ranks of the group and that of no other group, ``ranks`` are their global ranks.
    ``timeout_s`` is how long a peer is waited for. A *place* is a byte in a window.
    """

    def __init__(self, name: str, index: int, ranks: Sequence[int], size: WindowSize) -> None:
        self.name = name
        self.index = index
        self.ranks = ranks
        self.world = size.world
        self.size = size
        self.timeout_s = 1800.0

    @abstractmethod
    def fork(self, *lanes: Lane) -> None:
        """What is submitted to the lanes from here on comes after what the current stream was given so far."""

    @abstractmethod
    def put(self, peer: int, place: int, block: Block) -> None:
        """Sending lane: copies the block into the peer's window."""

    @abstractmethod
    def take(self, place: int, block: Block) -> None:
        """Receiving lane: copies from the own window into the block."""

    @abstractmethod
    def keep(self, lane: Lane, source: Block, target: Block) -> None:
        """Copies the rows that stay on this rank."""

    @abstractmethod
    def tell(self, lane: Lane, peer: int, counter: Counter, count: int) -> None:
        """The peer's counter for this rank becomes ``count``, when all earlier steps of the lane are done."""

    @abstractmethod
    def wait_until(self, lane: Lane, peer: int, counter: Counter, count: int) -> None:
        """The lane goes on when the peer has told this rank ``count`` or more."""

    @abstractmethod
    def own(self, place: int, size: int) -> torch.Tensor:
        """``[size]`` uint8: a part of the own window."""

    @property
    @abstractmethod
    def window_start(self) -> int:
        """Where in the storage of ``own`` a window begins, in bytes; alike on all ranks."""

    @abstractmethod
    def stream(self, lane: Lane) -> Any:
        """The torch stream that a lane is; None on a host."""

    @abstractmethod
    def join(self, *lanes: Lane) -> PendingCopies:
        """Everything that the lanes were given so far."""

    @abstractmethod
    def close(self) -> None:
        """Gives the memory back; nothing may be under way."""

"""AllToAll by copies into the memory of the other ranks of one node: no kernel, so GEMMs keep every multiprocessor.

Two ways through a window:

*Landing*: every rank knows how many rows each sends to each (``table``) and all that each receives fits a landing
area. A sender writes each block where the receiver reads it, and nothing is copied twice. The receiver's tensor is a
view of the area, which it must give back (``release``) when it has read it. Exchange n uses area n modulo 2, and a
sender writes it only when the receiver has released exchange n - 2.

*Ring*: without a table, or too large for an area, or while the program still holds the area. What goes from one rank
to another is cut into pieces of at most a slot. Both ends count the pieces of their pair since the start: piece n uses
slot n modulo the number of slots. The sender writes piece n only when the receiver has freed piece n - slots; the
receiver reads it when it has been told that n + 1 pieces have arrived, and frees it when it has copied it out. No
message is too large, and how many turns a pair takes follows from its own rows: nothing has to be agreed.

Which way an exchange goes follows from the table and from the order of the program: the same on all ranks.

Order of submission: all first pieces are put, then taken, then all second ones, and so on; an area is released by the
program before the exchange that will use it is begun. That would be a valid order for one lane alone, so hardware that
serves all streams from one queue (CUDA_DEVICE_MAX_CONNECTIONS=1) cannot lock up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.base import Landing, PendingWork, Table, Transport
from fluid_npu.comm.transports.collective import CollectiveTransport
from fluid_npu.comm.transports.peer_memory import LANDINGS, Block, Counter, Lane, PeerMemory, PendingCopies
from fluid_npu.device.choice import Choice

OpenMemory = Callable[[Any], Choice["PeerMemory | None"]]
"""Opens the windows of a group, on all of its ranks at once; all get memory, or all get None, and why."""


class PeerExchange:
    """The protocol on one group's windows: counts the pieces of each pair, and the exchanges that have landed."""

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._sent = [0] * memory.world
        self._taken = [0] * memory.world
        self._landed = 0
        self._held = [False] * LANDINGS
        self._areas: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        own, world = memory.index, memory.world
        #: Each rank begins with its right neighbour, so no two begin with the same one.
        self._targets = [(own + shift) % world for shift in range(1, world)]
        self._sources = [(own - shift) % world for shift in range(1, world)]

    def through_ring(
        self, output: torch.Tensor, source: torch.Tensor, from_peers: Sequence[int], to_peers: Sequence[int]
    ) -> PendingWork:
        """Submits one exchange. ``from_peers`` and ``to_peers`` are bytes for each rank, in rank order."""
        memory, own, step = self._memory, self._memory.index, self._memory.size.slot_bytes
        sends, receives = _blocks(source, to_peers), _blocks(output, from_peers)
        memory.fork(Lane.SENDING, Lane.RECEIVING)
        if to_peers[own]:
            memory.keep(Lane.RECEIVING, sends[own], receives[own])
        longest = max((max(to_peers[peer], from_peers[peer]) for peer in self._targets), default=0)
        for at in range(0, longest, step):
            for peer in self._targets:
                if to_peers[peer] > at:
                    self._put(peer, _part(sends[peer], at, step))
            for peer in self._sources:
                if from_peers[peer] > at:
                    self._take(peer, _part(receives[peer], at, step))
        return memory.join(Lane.SENDING, Lane.RECEIVING)

    def _put(self, peer: int, piece: Block) -> None:
        memory, number = self._memory, self._sent[peer]
        slots = memory.size.slots
        self._sent[peer] = number + 1
        if number >= slots:
            memory.wait_until(Lane.SENDING, peer, Counter.FREED, number - slots + 1)
        memory.put(peer, memory.size.slot(peer, memory.index, number % slots), piece)
        memory.tell(Lane.SENDING, peer, Counter.ARRIVED, number + 1)

    def _take(self, peer: int, piece: Block) -> None:
        memory, number = self._memory, self._taken[peer]
        self._taken[peer] = number + 1
        memory.wait_until(Lane.RECEIVING, peer, Counter.ARRIVED, number + 1)
        memory.take(memory.size.slot(memory.index, peer, number % memory.size.slots), piece)
        memory.tell(Lane.RECEIVING, peer, Counter.FREED, number + 1)

    def can_land(self, bytes_PP: Table) -> bool:
        """Whether all that each rank receives fits an area, and the program has given the next area back."""
        most = max(sum(column) for column in zip(*bytes_PP, strict=True))
        return most <= self._memory.size.landing_bytes and not self._held[self._landed % LANDINGS]

    def land(self, source: torch.Tensor, bytes_PP: Table, like: torch.Tensor) -> PeerLanding:
        """Submits one exchange whose rows, of the shape and dtype of the empty ``like``, land in an area.

        ``bytes_PP``: from each rank to each.
        """
        memory, own, number = self._memory, self._memory.index, self._landed
        area = memory.size.landing(number % LANDINGS)
        self._landed, self._held[number % LANDINGS] = number + 1, True
        sends = _blocks(source, bytes_PP[own])
        memory.fork(Lane.SENDING)
        for peer in self._targets:
            if sends[peer].size:
                if number >= LANDINGS:
                    memory.wait_until(Lane.SENDING, peer, Counter.RELEASED, number - LANDINGS + 1)
                before = sum(bytes_PP[rank][peer] for rank in range(own))
                memory.put(peer, area + before, sends[peer])
                memory.tell(Lane.SENDING, peer, Counter.LANDED, number + 1)
        copies = memory.join(Lane.SENDING)
        from_peers = [row[own] for row in bytes_PP]
        size = sum(from_peers)
        rows = self._area(number % LANDINGS, like.dtype)[: size // like.itemsize]
        rows = rows.view(size // _row_bytes(like), *like.shape[1:])
        if from_peers[own]:
            # By the program: a copy inside one GPU is a kernel, and on a lane would wait behind the GEMMs.
            memory.keep(Lane.PROGRAM, sends[own], Block(tensor=rows, start=sum(from_peers[:own]), size=from_peers[own]))
        senders = [peer for peer in self._sources if from_peers[peer]]
        return PeerLanding(rows, self, number, senders, copies)

    def _area(self, area: int, dtype: torch.dtype) -> torch.Tensor:
        """All of a landing area; made once, because it costs the host as much as a copy."""
        key = (area, dtype)
        if key not in self._areas:
            size = self._memory.size
            self._areas[key] = self._memory.own(size.landing(area), size.landing_bytes).view(dtype)
        return self._areas[key]

    def wait_for(self, senders: Sequence[int], number: int) -> None:
        """The program goes on when these ranks have written their rows of an exchange."""
        for peer in senders:
            self._memory.wait_until(Lane.PROGRAM, peer, Counter.LANDED, number + 1)

    def release(self, number: int) -> None:
        """The program does not read the area of that exchange any more."""
        for peer in self._sources:
            self._memory.tell(Lane.PROGRAM, peer, Counter.RELEASED, number + 1)
        self._held[number % LANDINGS] = False


class PeerLanding:
    """Rows in a landing area."""

    def __init__(
        self, rows: torch.Tensor, exchange: PeerExchange, number: int, senders: Sequence[int], copies: PendingCopies
    ) -> None:
        self.rows = rows
        self._exchange = exchange
        self._number = number
        self._senders = senders
        self._copies = copies

    def wait(self) -> None:
        """What is issued next may read the rows, and write what was sent."""
        self._exchange.wait_for(self._senders, self._number)
        self._copies.wait()

    def release(self) -> None:
        """What is issued next does not read the rows any more."""
        self._exchange.release(self._number)


def _blocks(tensor: torch.Tensor, sizes: Sequence[int]) -> list[Block]:
    blocks, start = [], 0
    for size in sizes:
        blocks.append(Block(tensor=tensor, start=start, size=size))
        start += size
    return blocks


def _part(block: Block, at: int, step: int) -> Block:
    return Block(tensor=block.tensor, start=block.start + at, size=min(step, block.size - at))


class PeerCopyTransport:
    """``open_memory`` gives a group's windows when the group is first used, on all of its ranks together.

    A group without windows (over several nodes, say) uses ``fallback``, which is said once with the reason.
    """

    name = "peer-copy"

    def __init__(
        self, open_memory: OpenMemory, fallback: Transport | None = None, *, timeout_s: float = 1800.0
    ) -> None:
        self._open = open_memory
        self._timeout_s = timeout_s
        self._fallback: Transport = fallback if fallback is not None else CollectiveTransport()
        self._exchanges: dict[str, PeerExchange | None] = {}
        self._memories: list[PeerMemory] = []

    def prepare(self, group: Any) -> Choice[bool]:
        """Opens the group's windows; a collective call. False with the reason when it has none."""
        memory, reason = self._open(group)
        self._exchanges[group.group_name] = PeerExchange(memory) if memory is not None else None
        if memory is not None:
            memory.timeout_s = self._timeout_s
            self._memories.append(memory)
        return Choice(memory is not None, reason)

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
    ) -> PendingWork:
        """Starts the exchange without blocking the host. Both tensors must be contiguous."""
        exchange = self._exchange(group)
        if exchange is None:
            return self._fallback.start(output, source, output_splits, input_splits, group)
        world = dist.get_world_size(group)
        return exchange.through_ring(
            output, source, _bytes(output, output_splits, world), _bytes(source, input_splits, world)
        )

    def land(self, source: torch.Tensor, table: Table, group: Any) -> Landing | None:
        """Starts the exchange into a window, without blocking the host; None when this one needs ``start``."""
        exchange = self._exchange(group)
        if exchange is None:
            return None
        row = _row_bytes(source)
        bytes_PP = [[rows * row for rows in of_rank] for of_rank in table]
        return exchange.land(source, bytes_PP, source[:0]) if row and exchange.can_land(bytes_PP) else None

    def _exchange(self, group: Any) -> PeerExchange | None:
        if group.group_name not in self._exchanges:
            found = self.prepare(group)
            if not found.value:
                Choice(self._fallback.name, f"peer-copy is not possible there: {found.reason}").announce(
                    f"transport of the group of ranks {dist.get_process_group_ranks(group)}"
                )
        return self._exchanges[group.group_name]

    @contextmanager
    def time_limit(self, seconds: float) -> Iterator[None]:
        """Inside a peer is waited for at most that long, by groups that are prepared."""
        for memory in self._memories:
            memory.timeout_s = seconds
        try:
            yield
        finally:
            for memory in self._memories:
                memory.timeout_s = self._timeout_s

    def close(self) -> None:
        """Gives all windows back; nothing may be under way."""
        for memory in self._memories:
            memory.close()
        self._memories.clear()
        self._exchanges.clear()


def _row_bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _bytes(tensor: torch.Tensor, splits: Sequence[int] | None, world: int) -> list[int]:
    row = _row_bytes(tensor)
    return [rows * row for rows in (splits if splits is not None else [tensor.shape[0] // world] * world)]

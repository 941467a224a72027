"""AllToAll by copies into the memory of the other ranks of one node: no kernel, so GEMMs keep every multiprocessor.

What goes from one rank to another is cut into pieces of at most a slot. Both ends count the pieces of their pair since
the start: piece n uses slot n modulo the number of slots. The sender writes piece n only when the receiver has freed
piece n - slots, the receiver reads it only when it has been told that n + 1 pieces have arrived, and frees it when it
has copied it out. So nothing received pins the window, and no message is too large: one that is longer than the ring
goes through it in turns. Who needs how many turns follows from the number of rows of the pair, which both ends know:
nothing has to be agreed over the group, and neither end needs to know what other pairs send.

Order of submission: all first pieces are put, then taken, then all second ones, and so on. That would be a valid order
for one lane alone, so hardware that serves all streams from one queue (CUDA_DEVICE_MAX_CONNECTIONS=1) cannot lock up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.base import PendingWork, Transport
from fluid_npu.comm.transports.collective import CollectiveTransport
from fluid_npu.comm.transports.peer_memory import Block, PeerMemory
from fluid_npu.device.choice import Choice

OpenMemory = Callable[[Any], Choice["PeerMemory | None"]]
"""Opens the windows of a group, on all of its ranks at once; all get memory, or all get None, and why."""


class PeerExchange:
    """The protocol on one group's windows: counts the pieces of each pair."""

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._sent = [0] * memory.world
        self._taken = [0] * memory.world

    def start(
        self, output: torch.Tensor, source: torch.Tensor, from_peers: Sequence[int], to_peers: Sequence[int]
    ) -> PendingWork:
        """Submits one exchange. ``from_peers`` and ``to_peers`` are bytes for each rank, in rank order."""
        memory, own = self._memory, self._memory.index
        sends = _blocks(source, to_peers)
        receives = _blocks(output, from_peers)
        memory.fork()
        if to_peers[own]:
            memory.keep(sends[own], receives[own])
        step = memory.size.slot_bytes
        turns = [(own + shift) % memory.world for shift in range(1, memory.world)]
        longest = max((max(sends[peer].size, receives[peer].size) for peer in turns), default=0)
        for at in range(0, longest, step):
            for peer in turns:
                if sends[peer].size > at:
                    self._put(peer, _part(sends[peer], at, step))
            for peer in reversed(turns):
                if receives[peer].size > at:
                    self._take(peer, _part(receives[peer], at, step))
        return memory.join()

    def _put(self, peer: int, piece: Block) -> None:
        number, slots = self._sent[peer], self._memory.size.slots
        self._sent[peer] = number + 1
        if number >= slots:
            self._memory.await_freed(peer, number - slots + 1)
        self._memory.put(peer, number % slots, piece)
        self._memory.tell_arrived(peer, number + 1)

    def _take(self, peer: int, piece: Block) -> None:
        number = self._taken[peer]
        self._taken[peer] = number + 1
        self._memory.await_arrived(peer, number + 1)
        self._memory.take(peer, number % self._memory.size.slots, piece)
        self._memory.tell_freed(peer, number + 1)


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
        if group.group_name not in self._exchanges:
            found = self.prepare(group)
            if not found.value:
                Choice(self._fallback.name, f"peer-copy is not possible there: {found.reason}").announce(
                    f"transport of the group of ranks {dist.get_process_group_ranks(group)}"
                )
        exchange = self._exchanges[group.group_name]
        if exchange is None:
            return self._fallback.start(output, source, output_splits, input_splits, group)
        world = dist.get_world_size(group)
        return exchange.start(output, source, _bytes(output, output_splits, world), _bytes(source, input_splits, world))

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


def _bytes(tensor: torch.Tensor, splits: Sequence[int] | None, world: int) -> list[int]:
    row = math.prod(tensor.shape[1:]) * tensor.element_size()
    return [rows * row for rows in (splits if splits is not None else [tensor.shape[0] // world] * world)]

"""Peer copies: which bytes of whose window are written and read, and what the ranks tell each other.

A window is one allocation of its owner, known to all ranks by the group's name. A counter that comes to a number is a
signal, waiting for the number is an await of that signal. The copies themselves are no operators of torch, so they are
noted from the calls that submit them. Record from a group's first exchange on: what was told before is not known.
"""

from __future__ import annotations

import time
from typing import Any

from fluid_npu.comm.transports.peer_cuda import CudaCopies, CudaPeerMemory
from fluid_npu.comm.transports.peer_host import HostCopies, HostPeerMemory
from fluid_npu.comm.transports.peer_memory import Block, Counter, Lane, PeerMemory
from fluid_npu.order.log import Log
from fluid_npu.order.memory import Memory, stream_name
from fluid_npu.order.patching import Patches
from fluid_npu.order.records import HOST, Access

_LANES = (Lane.SENDING, Lane.RECEIVING)


class PeerCopyHooks:
    """Notes the calls while installed."""

    def __init__(self, log: Log, memory: Memory) -> None:
        self._log = log
        self._memory = memory
        self._events = 0

    def install(self, patches: Patches) -> None:
        """Wraps the methods of the two kinds of peer memory."""
        for kind in (HostPeerMemory, CudaPeerMemory):
            patches.wrap(kind, "put", self._put)
            patches.wrap(kind, "take", self._take)
            patches.wrap(kind, "keep", self._keep)
            patches.wrap(kind, "tell", lambda old: self._counter(old, "signal"))
            patches.wrap(kind, "wait_until", lambda old: self._counter(old, "await"))
            patches.wrap(kind, "fork", self._fork)
            patches.wrap(kind, "join", self._join)
        for copies in (HostCopies, CudaCopies):
            patches.wrap(copies, "wait", self._wait)

    def _fork(self, old: Any) -> Any:
        """On a host the lanes come after the program anyway."""

        def fork(memory: PeerMemory, *lanes: Lane) -> None:
            old(memory, *lanes)
            self._memory.adopt(memory.own(0, 1), _name(memory))
            if memory.stream(Lane.PROGRAM) is None:
                return
            event = self._event()
            self._log.add("record", event=event, stream=_stream(memory, Lane.PROGRAM))
            for lane in lanes:
                self._log.add("wait", event=event, stream=_stream(memory, lane))

        return fork

    def _put(self, old: Any) -> Any:
        def put(memory: PeerMemory, peer: int, place: int, block: Block) -> None:
            writes = (_window(memory, peer, place, block.size),)
            self._op("peer-copy put", memory, Lane.SENDING, self._block(block), writes)
            old(memory, peer, place, block)

        return put

    def _take(self, old: Any) -> Any:
        def take(memory: PeerMemory, place: int, block: Block) -> None:
            reads = (_window(memory, memory.index, place, block.size),)
            self._op("peer-copy take", memory, Lane.RECEIVING, reads, self._block(block))
            old(memory, place, block)

        return take

    def _keep(self, old: Any) -> Any:
        def keep(memory: PeerMemory, lane: Lane, source: Block, target: Block) -> None:
            self._op("peer-copy keep", memory, lane, self._block(source), self._block(target))
            old(memory, lane, source, target)

        return keep

    def _counter(self, old: Any, kind: str) -> Any:
        def call(memory: PeerMemory, lane: Lane, peer: int, counter: Counter, count: int) -> None:
            ends = (memory.index, peer) if kind == "signal" else (peer, memory.index)
            teller, told = (memory.ranks[end] for end in ends)
            event = f"{_name(memory)}: {counter.name.lower()} {count} by {teller} to {told}"
            self._log.add(kind, event=event, stream=_stream(memory, lane), at=time.perf_counter())
            old(memory, lane, peer, counter, count)

        return call

    def _join(self, old: Any) -> Any:
        def join(memory: PeerMemory, *lanes: Lane) -> Any:
            copies = old(memory, *lanes)
            events = [self._event() for _ in lanes]
            for event, lane in zip(events, lanes, strict=True):
                self._log.add("record", event=event, stream=_stream(memory, lane))
            copies.order_memory, copies.order_events = memory, events
            return copies

        return join

    def _wait(self, old: Any) -> Any:
        def wait(copies: Any) -> None:
            at = time.perf_counter()
            old(copies)
            if not hasattr(copies, "order_events"):
                return
            program = _stream(copies.order_memory, Lane.PROGRAM)
            for event in copies.order_events:
                kind = {"kind": "sync"} if program == HOST else {"kind": "wait", "stream": program}
                self._log.add(**kind, event=event, at=at)

        return wait

    def _event(self) -> str:
        self._events += 1
        return f"peer-copy {self._events}"

    def _op(self, name: str, memory: PeerMemory, lane: Lane, reads: Any, writes: Any) -> None:
        at = time.perf_counter()
        self._log.add("op", name=name, stream=_stream(memory, lane), reads=reads, writes=writes, at=at)

    def _block(self, block: Block) -> tuple[Access, ...]:
        whole = self._memory.access(block.tensor)
        if whole is None or not block.size:
            return ()
        start = whole.start + block.start
        return (Access(whole.alloc, start, start + block.size),)


def _name(memory: PeerMemory) -> str:
    return f"window of group {memory.name}"


def _stream(memory: PeerMemory, lane: Lane) -> str:
    stream = memory.stream(lane)
    if stream is not None:
        return stream_name(stream)
    return HOST if lane is Lane.PROGRAM else f"{_name(memory)}/{lane.value}"


def _window(memory: PeerMemory, owner: int, place: int, size: int) -> Access:
    """Bytes are counted from the begin of the storage, as those of a tensor are; it begins alike on all ranks."""
    start = memory.window_start + place
    return Access(_name(memory), start, start + size, memory.ranks[owner])

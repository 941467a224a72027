"""Windows on the host: shared memory of the processes of one node, two threads as lanes, counters that are polled.

On a CPU this is a transport like any other; it is also what the protocol is tested with, by real processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.host_lane import HostLane, Mark
from fluid_npu.comm.transports.peer_memory import Block, Counter, Lane, PeerMemory, WindowSize
from fluid_npu.comm.transports.shared_files import SharedFile, share
from fluid_npu.device.choice import Choice

_COUNTER_INTS = 16  # 64 bytes: a cache line each
_LOOK_S = 0.2


class HostPeerMemory(PeerMemory):
    """``files[rank]`` is that rank's memory: counters, then the window."""

    def __init__(self, name: str, index: int, ranks: Sequence[int], size: WindowSize, files: list[SharedFile]) -> None:
        super().__init__(name, index, ranks, size)
        head = _head_bytes(size.world)
        self._files = files
        self._counters = [file.bytes[:head].view(torch.int32).numpy() for file in files]
        self._windows = [file.bytes[head:] for file in files]
        self._lanes = {
            Lane.SENDING: HostLane("peer-copy sends"),
            Lane.RECEIVING: HostLane("peer-copy receives"),
        }
        self._fence = threading.Lock()

    def fork(self, *lanes: Lane) -> None:
        """Operators of a CPU have ended when their call returns."""

    def put(self, peer: int, place: int, block: Block) -> None:
        target, source = self._windows[peer][place : place + block.size], _bytes_of(block)
        self._submit(Lane.SENDING, lambda: _copy(target, source))

    def take(self, place: int, block: Block) -> None:
        target, source = _bytes_of(block), self.own(place, block.size)
        self._submit(Lane.RECEIVING, lambda: _copy(target, source))

    def keep(self, lane: Lane, source: Block, target: Block) -> None:
        to, of = _bytes_of(target), _bytes_of(source)
        self._submit(lane, lambda: _copy(to, of))

    def tell(self, lane: Lane, peer: int, counter: Counter, count: int) -> None:
        self._submit(lane, lambda: self._tell(peer, counter, count))

    def wait_until(self, lane: Lane, peer: int, counter: Counter, count: int) -> None:
        self._submit(lane, lambda: self._await(peer, self._place(counter, peer), count))

    def own(self, place: int, size: int) -> torch.Tensor:
        return self._windows[self.index][place : place + size]

    @property
    def window_start(self) -> int:
        return _head_bytes(self.world)

    def stream(self, lane: Lane) -> None:
        return None

    def join(self, *lanes: Lane) -> HostCopies:
        return HostCopies(*(self._lanes[lane].mark() for lane in lanes))

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        self._counters.clear()
        self._windows.clear()
        for file in self._files:
            file.close()

    def _submit(self, lane: Lane, step: Callable[[], None]) -> None:
        if lane is Lane.PROGRAM:
            step()
        else:
            self._lanes[lane].submit(step)

    def _place(self, counter: Counter, teller: int) -> int:
        return (counter * self.world + teller) * _COUNTER_INTS

    def _tell(self, peer: int, counter: Counter, count: int) -> None:
        # A lock orders memory on every processor: nobody sees the counter before what was copied.
        with self._fence:
            pass
        with self._fence:
            self._counters[peer][self._place(counter, self.index)] = _wrapped(count)

    def _await(self, peer: int, place: int, count: int) -> None:
        pause, waited = 0.0, time.monotonic()
        looked = waited
        while _wrapped(int(self._counters[self.index][place]) - count) < 0:
            time.sleep(pause)
            pause = min(pause + 1e-5, 1e-3)
            now = time.monotonic()
            if now - looked > _LOOK_S:
                looked = now
                self._look(peer, place, count, now - waited)
        with self._fence:
            pass

    def _look(self, peer: int, place: int, count: int, waited: float) -> None:
        lives = self._files[peer].owner_lives()
        if _wrapped(int(self._counters[self.index][place]) - count) >= 0:
            return  # its last words
        if not lives:
            raise RuntimeError(f"peer-copy: connection to rank {peer} of the group lost: its process has ended")
        if waited > self.timeout_s:
            raise RuntimeError(f"peer-copy: timed out after {waited:.0f} s waiting for rank {peer} of the group")


class HostCopies:
    """Both lanes' ends."""

    def __init__(self, *ends: Mark) -> None:
        self._ends = ends

    def wait(self) -> None:
        for end in self._ends:
            end.wait()


def _wrapped(number: int) -> int:
    """As a signed 32-bit number: counters may wrap around."""
    return (number + 2**31) % 2**32 - 2**31


def _bytes_of(block: Block) -> torch.Tensor:
    return block.tensor.detach().view(-1).view(torch.uint8)[block.start : block.start + block.size]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _head_bytes(world: int) -> int:
    return -(-len(Counter) * world * _COUNTER_INTS * 4 // 4096) * 4096


def open_host_memory(group: Any, size: WindowSize) -> Choice[PeerMemory | None]:
    """The windows of a group of CPU ranks; a collective call, with the same answer on all of them."""
    files, reason = share(group, _head_bytes(size.world) + size.total)
    if files is None:
        return Choice(None, reason)
    ranks = dist.get_process_group_ranks(group)
    return Choice(HostPeerMemory(group.group_name, dist.get_rank(group), ranks, size, files), reason)

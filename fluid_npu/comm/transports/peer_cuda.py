"""Windows on CUDA: torch's symmetric memory, the copy engines, stream memory operations.

The two lanes are streams of high priority. One tensor of symmetric memory holds the counters, 128 bytes apart, and then
the window; every rank has the addresses of all of them.

A copy between two GPUs is the copy engines' work and needs no multiprocessor. A copy inside one GPU is a kernel
(measured on an H200 with driver 580: plain, with the driver's hint to leave compute alone, as a copy of a peer, and in
two dimensions), so ``take`` and ``keep`` wait behind GEMMs that hold them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.guard import one_line
from fluid_npu.comm.transports.agreement import gathered, node_name
from fluid_npu.comm.transports.peer_memory import Block, Counter, Lane, PeerMemory, WindowSize
from fluid_npu.comm.transports.peer_watch import PeerWatch
from fluid_npu.comm.transports.shared_files import SharedFile, share
from fluid_npu.device.choice import Choice
from fluid_npu.device.cuda_driver import CudaMark, cuda_driver

_SINCE = (2, 9)
_COUNTER_BYTES = 128
_FAR = 1 << 30


class CudaPeerMemory(PeerMemory):
    """``buffers[rank]`` are that rank's counters and window, as this process sees them."""

    def __init__(
        self,
        name: str,
        index: int,
        ranks: Sequence[int],
        size: WindowSize,
        buffers: list[torch.Tensor],
        lives: Sequence[SharedFile],
    ) -> None:
        super().__init__(name, index, ranks, size)
        self._driver = cuda_driver()
        self._context = self._driver.context()
        self._buffers = buffers
        self._base = [buffer.data_ptr() for buffer in buffers]
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._sending = torch.cuda.Stream(device=self._device, priority=-1)
        self._receiving = torch.cuda.Stream(device=self._device, priority=-1)
        self._out, self._in = self._sending.cuda_stream, self._receiving.cuda_stream
        self._help = torch.cuda.Stream(device=self._device)
        self._highest = 0
        self._watch = PeerWatch(index, lives, self._enter, self._let_all_waits_pass)

    def fork(self, *lanes: Lane) -> None:
        self._watch.timeout_s = self.timeout_s
        self._watch.check()
        self._enter()
        now = self._driver.mark(self._number(Lane.PROGRAM))
        for lane in lanes:
            now.hold_back(self._number(lane))

    def put(self, peer: int, place: int, block: Block) -> None:
        target = self._base[peer] + _head_bytes(self.world) + place
        self._driver.copy(target, _address(block), block.size, self._out)

    def take(self, place: int, block: Block) -> None:
        source = self._base[self.index] + _head_bytes(self.world) + place
        self._driver.copy(_address(block), source, block.size, self._in)

    def keep(self, lane: Lane, source: Block, target: Block) -> None:
        self._driver.copy(_address(target), _address(source), source.size, self._number(lane))

    def tell(self, lane: Lane, peer: int, counter: Counter, count: int) -> None:
        self._driver.write(self._counter(peer, counter, self.index), count, self._number(lane))

    def wait_until(self, lane: Lane, peer: int, counter: Counter, count: int) -> None:
        self._highest = max(self._highest, count)
        self._driver.wait(self._counter(self.index, counter, peer), count, self._number(lane))

    def own(self, place: int, size: int) -> torch.Tensor:
        start = _head_bytes(self.world) + place
        return self._buffers[self.index][start : start + size]

    @property
    def window_start(self) -> int:
        return _head_bytes(self.world)

    def stream(self, lane: Lane) -> torch.cuda.Stream:
        if lane is Lane.PROGRAM:
            return torch.cuda.current_stream(self._device)
        return self._sending if lane is Lane.SENDING else self._receiving

    def join(self, *lanes: Lane) -> CudaCopies:
        ends = [self._driver.mark(self._number(lane)) for lane in lanes]
        for end in ends:
            self._watch.add(end)
        return CudaCopies(self, ends)

    def follow(self, ends: Sequence[CudaMark]) -> None:
        """The current stream goes on behind these points."""
        self._watch.check()
        self._enter()
        current = self._number(Lane.PROGRAM)
        for end in ends:
            end.hold_back(current)
        self._watch.add(self._driver.mark(current))

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        self._watch.close()
        self._buffers.clear()

    def _enter(self) -> None:
        """The calling thread may not have used the device yet."""
        self._driver.enter(self._context)

    def _let_all_waits_pass(self) -> None:
        for counter in Counter:
            for peer in range(self.world):
                address = self._counter(self.index, counter, peer)
                self._driver.write(address, self._highest + _FAR, self._help.cuda_stream)

    def _number(self, lane: Lane) -> int:
        if lane is Lane.PROGRAM:
            return int(torch._C._cuda_getCurrentRawStream(self._device.index))
        return self._out if lane is Lane.SENDING else self._in

    def _counter(self, rank: int, counter: Counter, teller: int) -> int:
        return self._base[rank] + (counter * self.world + teller) * _COUNTER_BYTES


class CudaCopies:
    """The lanes' ends: the sending lane may still read the source when everything has arrived."""

    def __init__(self, memory: CudaPeerMemory, ends: Sequence[CudaMark]) -> None:
        self._memory = memory
        self._ends = ends

    def wait(self) -> None:
        self._memory.follow(self._ends)


def _address(block: Block) -> int:
    return block.tensor.data_ptr() + block.start


def _head_bytes(world: int) -> int:
    return -(-len(Counter) * world * _COUNTER_BYTES // 4096) * 4096


def open_cuda_memory(group: Any, size: WindowSize) -> Choice[PeerMemory | None]:
    """The windows of a group of CUDA ranks; a collective call, with the same answer on all of them."""
    total = _head_bytes(size.world) + size.total
    buffers, reason = symmetric_buffers(group, total, _head_bytes(size.world))
    if buffers is None:
        return Choice(None, reason)
    lives, reason = share(group, 4096)
    if lives is None:
        return Choice(None, reason)
    ranks, index = dist.get_process_group_ranks(group), dist.get_rank(group)
    memory = CudaPeerMemory(group.group_name, index, ranks, size, buffers, lives)
    return Choice(memory, f"symmetric memory, {total >> 20} MiB a rank")


def symmetric_buffers(group: Any, total: int, zeroed: int) -> Choice[list[torch.Tensor] | None]:
    """``[total]`` uint8 of each rank as this one sees them, the first ``zeroed`` bytes zero; a collective call.

    None on all ranks, with the reason, where the ranks of the group have no such memory.
    """
    missing = [text for text in gathered(_missing(group), group) if text]
    if missing:
        return Choice(None, missing[0])
    if len(set(gathered(node_name(), group))) > 1:
        return Choice(None, "the ranks are on several nodes")
    return _allocate(group, total, zeroed)


def _missing(group: Any) -> str:
    """What this rank lacks; empty when nothing."""
    if torch.cuda.device_count() == 0:
        return "torch sees no CUDA GPU"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SINCE:
        return f"torch {torch.__version__}: symmetric memory is used from torch {'.'.join(map(str, _SINCE))} on"
    try:
        cuda_driver()
    except (OSError, AttributeError) as error:
        return f"libcuda.so.1: {error}"
    others = {index for index in range(torch.cuda.device_count())} - {torch.cuda.current_device()}
    far = [index for index in others if not torch.cuda.can_device_access_peer(torch.cuda.current_device(), index)]
    return f"GPU {torch.cuda.current_device()} cannot reach the memory of GPU {far[0]}" if far else ""


def _allocate(group: Any, total: int, zeroed: int) -> Choice[list[torch.Tensor] | None]:
    """Memory, then the others' addresses. Each step is agreed on before the next one is begun."""
    import torch.distributed._symmetric_memory as symmetric

    world, index = dist.get_world_size(group), dist.get_rank(group)
    own: Any = None
    buffers: list[torch.Tensor] = []

    def allocate() -> None:
        nonlocal own
        own = symmetric.empty(total, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
        own[:zeroed].zero_()
        torch.cuda.synchronize()

    def exchange() -> None:
        handle = symmetric.rendezvous(own, group.group_name)
        buffers.extend(handle.get_buffer(rank, (total,), torch.uint8) for rank in range(world))
        buffers[index] = own

    for step in (allocate, exchange):
        error = ""
        try:
            step()
        except RuntimeError as failure:
            error = f"symmetric memory of {total} bytes: {one_line(str(failure))}"
        failures = [text for text in gathered(error, group) if text]
        if failures:
            return Choice(None, failures[0])
    return Choice(buffers, f"symmetric memory, {total >> 20} MiB a rank")

"""Collectives of torch.distributed: who sends what, from the call until its Work was waited for.

What torch.distributed promises is what is recorded: on an accelerator a collective starts after the current stream's
work so far, and ``wait()`` makes the current stream wait; on the host it runs beside the program until ``wait()``.
Collectives that C++ issues by itself (torch's own DDP reducer) are not seen.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.host_lane import on_host_lane
from fluid_npu.order.log import Log
from fluid_npu.order.memory import Memory, stream_of, tensors_in
from fluid_npu.order.patching import Patches
from fluid_npu.order.records import HOST

# Methods of ProcessGroup by where their buffers are; newer torch has new names for some.
_IN_PLACE = ("allreduce", "allreduce_coalesced", "reduce", "broadcast")
_OUT_IN = """
    allgather allgather_coalesced _allgather_base all_gather_single all_gather_single_coalesced
    allgather_into_tensor_coalesced reduce_scatter _reduce_scatter_base reduce_scatter_single
    reduce_scatter_single_coalesced reduce_scatter_tensor_coalesced alltoall_base all_to_all_single alltoall
    gather scatter
""".split()  # noqa: SIM905
_P2P = ("send", "recv", "recv_anysource")
_SAME = {"all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base"}
_SAME["all_to_all_single"] = "alltoall_base"


class ProcessGroupHooks:
    """Notes collectives and waits while installed. ``label()`` says what the next collective is for."""

    def __init__(self, log: Log, memory: Memory, label: Callable[[], str]) -> None:
        self._log = log
        self._memory = memory
        self._label = label
        self._groups: set[str] = set()
        self._works: dict[int, tuple[list[int], torch.device, weakref.ref[Any]]] = {}
        self._coalesced: list[int] | None = None
        self.paused = False

    def install(self, patches: Patches) -> None:
        """Wraps ProcessGroup and Work."""
        group = dist.ProcessGroup
        for name in (*_IN_PLACE, *_OUT_IN, *_P2P, "barrier"):
            patches.wrap(group, name, lambda old, name=name: self._issuing(old, name))
        patches.wrap(group, "_start_coalescing", self._starting)
        patches.wrap(group, "_end_coalescing", self._ending)
        for name in ("wait", "synchronize"):
            patches.wrap(dist.Work, name, self._waiting)
        patches.wrap(dist.Work, "is_completed", self._asking)

    def _issuing(self, old: Any, name: str) -> Any:
        def issue(group: Any, *args: Any, **kwargs: Any) -> Any:
            if self.paused or on_host_lane():
                return old(group, *args, **kwargs)
            began = time.perf_counter()
            reads, writes = _buffers(name, group, args)
            number, device = self._note(group, name, args, reads, writes, began)
            work = old(group, *args, **kwargs)
            if self._coalesced is not None:
                self._coalesced.append(number)
            elif work is not None:
                self._remember(work, [number], device)
            return work

        return issue

    def launch(self, name: str, group: Any, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> int:
        """Notes a collective that torch.distributed does not issue."""
        return self._note(group, name, (), reads, writes, time.perf_counter())[0]

    def message(self, call: dist.P2POp, after: str) -> int:
        """Notes a message of the host that a thread will start after what was noted on the stream ``after``."""
        sends = call.op is dist.isend
        reads, writes = ([call.tensor], []) if sends else ([], [call.tensor])
        began, lanes = time.perf_counter(), {"after": after}
        return self._note(call.group, "send" if sends else "recv", (), reads, writes, began, lanes)[0]

    def numbers_of(self, work: Any) -> list[int]:
        """What a Work was noted as."""
        return self._works[id(work)][0] if id(work) in self._works else []

    def _note(
        self,
        group: Any,
        name: str,
        args: Any,
        reads: list[Any],
        writes: list[Any],
        began: float,
        lanes: dict[str, Any] | None = None,
    ) -> tuple[int, torch.device]:
        key = self._know(group)
        device = next((x.device for x in (*writes, *reads)), torch.device("cpu"))
        current = stream_of(device)
        lanes = lanes or {}
        if current != HOST:
            lanes = {"stream": f"{current.partition('/')[0]}/group {key}", "after": current}
        number = self._log.add(
            "collective",
            name=_SAME.get(name, name),
            group=key,
            label=self._label(),
            reads=self._memory.accesses(reads),
            writes=self._memory.accesses(writes),
            at=began,
            **lanes,
            **_sizes(name, group, args),
        )
        return number, device

    def _know(self, group: Any) -> str:
        key = str(group.group_name)
        if key not in self._groups:
            self._groups.add(key)
            self._log.add("group", group=key, ranks=tuple(dist.get_process_group_ranks(group)))
        return key

    def _remember(self, work: Any, numbers: list[int], device: torch.device) -> None:
        key = id(work)
        self._works[key] = (numbers, device, weakref.ref(work, lambda _: self._works.pop(key, None)))

    def _starting(self, old: Any) -> Any:
        def start(group: Any, *args: Any) -> Any:
            self._coalesced = []
            return old(group, *args)

        return start

    def _ending(self, old: Any) -> Any:
        def end(group: Any, *args: Any) -> Any:
            work, numbers, self._coalesced = old(group, *args), self._coalesced or [], None
            if work is not None:
                self._remember(work, numbers, args[0] if args else torch.device("cpu"))
            return work

        return end

    def _waiting(self, old: Any) -> Any:
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = old(work, *args, **kwargs)
            self._landed(work, began)
            return result

        return wait

    def _asking(self, old: Any) -> Any:
        def is_completed(work: Any) -> bool:
            done: bool = old(work)
            if done:
                self._landed(work, time.perf_counter(), on_host=True)
            return done

        return is_completed

    def _landed(self, work: Any, began: float, on_host: bool = False) -> None:
        known = self._works.get(id(work))
        if known is None or self.paused or on_host_lane():
            return
        numbers, device, _ = known
        for number in numbers:
            self._log.add("landed", of=number, stream=HOST if on_host else stream_of(device), at=began)


def _buffers(name: str, group: Any, args: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(reads, writes) of this rank."""
    first = list(tensors_in(args[0])) if args else []
    if name == "barrier":
        return [], []
    if name in _OUT_IN:
        return list(tensors_in(args[1])), first
    if name == "broadcast" and len(args) > 1:
        return (first, []) if _root(args[1]) == group.rank() else ([], first)
    if name in _P2P:
        return (first, []) if name == "send" else ([], first)
    return first, first


def _root(options: Any) -> int:
    return int(getattr(options, "rootRank", options if isinstance(options, int) else 0))


def _sizes(name: str, group: Any, args: Any) -> dict[str, Any]:
    """Bytes for and from each rank of the group, where they can differ; without them every rank hears from all."""
    size = group.size()
    if name in ("alltoall_base", "all_to_all_single"):
        output, source, taken, given = args[:4]
        return {"sends": _bytes(source, given, size), "receives": _bytes(output, taken, size)}
    if name == "broadcast" and len(args) > 1:
        root = _root(args[1])
        count = sum(x.numel() * x.element_size() for x in tensors_in(args[0]))
        own = group.rank() == root
        others = tuple(count if own and rank != root else 0 for rank in range(size))
        return {"sends": others, "receives": tuple(count if not own and rank == root else 0 for rank in range(size))}
    return {}


def _bytes(tensor: torch.Tensor, splits: Any, size: int) -> tuple[int, ...]:
    rows = list(splits) or [tensor.shape[0] // size] * size
    width = tensor.element_size() * (tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0)
    return tuple(int(count) * width for count in rows)

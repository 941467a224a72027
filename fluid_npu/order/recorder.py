"""Records what this process submits, for the order checker: on a CPU, on CUDA and on an NPU.

    with OrderRecorder(rank) as recorder:
        train_step()
    recorder.save("records")        # then, when every rank has: fluid-npu check-order records

Seen are operators that pass torch's dispatcher, collectives of torch.distributed, peer copies, events and streams of
torch.cuda and torch.npu, and the life of every storage. A record grows by about 300 bytes an operator: record a few
steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fluid_npu.order.device_splits import DeviceSplitsHooks
from fluid_npu.order.log import Log
from fluid_npu.order.memory import Memory, stream_of
from fluid_npu.order.operators import OperatorMode
from fluid_npu.order.patching import Patches
from fluid_npu.order.peer_copies import PeerCopyHooks
from fluid_npu.order.process_groups import ProcessGroupHooks
from fluid_npu.order.records import Entry
from fluid_npu.order.streams import StreamHooks, note_host_reads
from fluid_npu.order.two_level import TwoLevelHooks


def _no_label() -> str:
    return ""


class OrderRecorder:
    """A context manager around what is to be recorded; enter it on every rank.

    Args:
        rank: global rank of this process; None reads RANK.
        label: what the collective that is issued now is for; ranks must agree on it.
    """

    def __init__(self, rank: int | None = None, label: Callable[[], str] = _no_label) -> None:
        self._log = Log(int(os.environ.get("RANK", "0")) if rank is None else rank, f"torch {torch.__version__}")
        self._memory = Memory(self._log)
        self._mode = OperatorMode(self._log, self._memory)
        self._groups = ProcessGroupHooks(self._log, self._memory, label)
        self._patches = Patches()

    def __enter__(self) -> OrderRecorder:
        if torch.distributed.is_available():
            self._groups.install(self._patches)
        streams = StreamHooks(self._log)
        for module in (torch.cuda if torch.cuda.is_available() else None, sys.modules.get("torch_npu")):
            if module is not None:
                streams.install(self._patches, getattr(module, "npu", module))
        PeerCopyHooks(self._log, self._memory).install(self._patches)
        TwoLevelHooks(self._log, self._groups).install(self._patches)
        DeviceSplitsHooks(self._log, self._memory, self.paused).install(self._patches)
        note_host_reads(self._patches, self._log, self._memory)
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, value, trace)
        self._patches.undo()
        # Tensors outlive the record: what is freed from here on is no part of it.
        self._memory.forget()

    @property
    def entries(self) -> list[Entry]:
        """What was recorded so far, in the order of submission."""
        return self._log.entries

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes this rank's file into the folder."""
        return self._log.save(folder)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the body does is not recorded: a transport says by ``launch`` and ``land`` what it promises instead."""
        before = self._mode.paused
        self._mode.paused = self._groups.paused = True
        try:
            yield
        finally:
            self._mode.paused = self._groups.paused = before

    def launch(self, name: str, group: Any, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> int:
        """A collective of a transport that this package does not know; returns what ``land`` takes."""
        return self._groups.launch(name, group, list(reads), list(writes))

    def land(self, number: int, device: torch.device) -> None:
        """What this thread submits to the device next comes after the collective."""
        self._log.add("landed", of=number, stream=stream_of(device))

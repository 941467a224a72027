"""The collective on process groups of its own, with settings that the job's groups must not have.

Exchanges of one group take its twins in turn, so as many as there are twins can be under way at once where a backend
runs the collectives of one communicator one after the other. Every rank begins them in the same order, so all take the
same twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.group_names import new_local_group
from fluid_npu.comm.transports.base import PendingWork
from fluid_npu.device.choice import Choice
from fluid_npu.device.graphs import release_recordings


class OwnGroupsTransport:
    """``all_to_all_single`` on twins of each group, made in ``prepare`` or at the first use of a group.

    Args:
        name: of the transport.
        backend: of the twins.
        options: makes the backend's options.
        twins: for each group.
        reason: what is special about them.
    """

    def __init__(self, name: str, backend: str, options: Callable[[], Any], twins: int, reason: str) -> None:
        self.name = name
        self._backend = backend
        self._options = options
        self._count = twins
        self._reason = reason
        self._twins: dict[str, list[Any]] = {}
        self._next: dict[str, int] = {}
        self._recorded = False

    @property
    def recordable(self) -> bool:
        """With one twin a group, the host counts nothing; NCCL's calls can be part of a CUDA graph."""
        return self._count == 1 and self._backend == "nccl"

    def prepare(self, group: Any) -> Choice[bool]:
        """Makes the group's twins; a collective call of all of its ranks."""
        # Ranks outside of the group do not take part: groups may be made by each on its own.
        ranks = dist.get_process_group_ranks(group)
        self._twins[group.group_name] = [
            new_local_group(ranks, self._backend, self._options()) for _ in range(self._count)
        ]
        self._next[group.group_name] = 0
        return Choice(True, self._reason)

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
    ) -> PendingWork:
        """Starts the exchange without blocking the host."""
        name = group.group_name
        if name not in self._twins:
            self.prepare(group)
        turn = self._next[name]
        self._next[name] = (turn + 1) % self._count
        twin = self._twins[name][turn]
        self._recorded = self._recorded or (source.is_cuda and torch.cuda.is_current_stream_capturing())
        return dist.all_to_all_single(output, source, output_splits, input_splits, group=twin, async_op=True)

    def close(self) -> None:
        """Gives the communicators back; before them all recordings, if one holds an exchange."""
        if self._recorded:
            release_recordings()
        for twins in self._twins.values():
            for twin in twins:
                dist.destroy_process_group(twin)
        self._twins.clear()

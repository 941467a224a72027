"""AllToAll in tournament rounds: in each round a rank sends to one other and receives from one other.

Messages of several rounds do not share a receiving link, which matters where P - 1 senders would meet at one port. The
calls are batched ``isend`` and ``irecv``, which gloo, NCCL and HCCL all have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.base import PendingWork


class _Rounds:
    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works.clear()


class PairwiseTransport:
    """Point-to-point messages of exactly the rows of each pair; nothing is sent where a pair has none."""

    name = "pairwise"

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
    ) -> PendingWork:
        """Starts all rounds without blocking the host."""
        world, own = dist.get_world_size(group), dist.get_rank(group)
        sends = _parts(source, input_splits, world)
        receives = _parts(output, output_splits, world)
        works: list[Any] = []
        for shift in range(1, world):
            to, of = (own + shift) % world, (own - shift) % world
            calls = [_call(dist.isend, sends[to], to, group), _call(dist.irecv, receives[of], of, group)]
            batch = [call for call in calls if call is not None]
            if batch:
                works += dist.batch_isend_irecv(batch)
        receives[own].copy_(sends[own])
        return _Rounds(works)


def _parts(tensor: torch.Tensor, splits: Sequence[int] | None, world: int) -> Sequence[torch.Tensor]:
    return tensor.split(list(splits) if splits is not None else [tensor.shape[0] // world] * world)


def _call(kind: Any, part: torch.Tensor, peer: int, group: Any) -> Any:
    if not part.numel():
        return None
    return dist.P2POp(kind, part, dist.get_global_rank(group, peer), group)

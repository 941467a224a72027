"""The floor of a layer: the same layer, each AllToAll of rows replaced by a copy of the rank's own rows."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fluid_npu.comm.transports import CollectiveTransport
from fluid_npu.mcore.agreed_room import AgreedRoom
from fluid_npu.mcore.graph_choice import graphed
from fluid_npu.schedule.graphed import GraphedLayer
from fluid_npu.schedule.scheduler import BackwardScheduler

#: One object, so that a recording of the floor finds the transport that it was made with.
_COLLECTIVE = CollectiveTransport()
#: Recordings of floors by layer, and the room of their dispatches: those of the layer itself have its AllToAlls.
_FLOORS: weakref.WeakKeyDictionary[Any, tuple[GraphedLayer | None, AgreedRoom | None]] = weakref.WeakKeyDictionary()


class _Done:
    """The handle of an exchange that has ended."""

    def wait(self) -> None:
        """Returns at once."""


@contextmanager
def local_slices(scheduler: BackwardScheduler | None = None, moe: Any = None) -> Iterator[None]:
    """Every AllToAll of rows becomes a copy of this rank's own rows, as many as fit; counts are still exchanged.

    ``scheduler``: of a layer of ours, whose transport may be another than the collective. ``moe``: the MoE layer, which
    may be recorded.
    """
    exchange = dist.all_to_all_single

    def slice_of(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not source.is_floating_point():
            return exchange(output, source, *args, **kwargs)
        rows = min(output.shape[0], source.shape[0])
        output[:rows].copy_(source[:rows])
        output[rows:].zero_()
        return _Done() if kwargs.get("async_op") else None

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_to_all_single", slice_of))
        if scheduler is not None:
            stack.enter_context(mock.patch.object(scheduler, "transport", _COLLECTIVE))
        if getattr(moe, "graphed", None) is not None:
            dispatcher = moe.token_dispatcher
            if moe not in _FLOORS:
                with mock.patch.object(dispatcher, "room", None):
                    _FLOORS[moe] = graphed(moe, moe._in_one_piece), dispatcher.room
            floor, room = _FLOORS[moe]
            stack.enter_context(mock.patch.object(moe, "graphed", floor))
            stack.enter_context(mock.patch.object(dispatcher, "room", room))
        yield

"""AllToAll in two legs, between nodes and inside them (``two_level_plan``): fewer and longer messages on the network.

The second leg begins when the first has landed, beside the program: on an accelerator a stream of its own waits for the
one and issues the other; on a host a thread does. Messages are batched ``isend`` and ``irecv``, which gloo, NCCL and
HCCL have, straight from where the rows are to where they belong.

A rank must know what goes through it, so an exchange needs its table. One without a table, unless its splits are
equal, and a group that has no two levels use the collective; that is said once.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.transports.base import PendingWork, Table
from fluid_npu.comm.transports.collective import CollectiveTransport
from fluid_npu.comm.transports.host_lane import HostLane, Mark
from fluid_npu.comm.transports.nodes import Nodes, nodes_of
from fluid_npu.comm.transports.two_level_plan import Copy, Leg, TwoLegs, Where, plan_legs
from fluid_npu.device.choice import Choice

Buffers = dict[Where, torch.Tensor]
_MOST_PLANS = 256  # two for each layer between its forward and its backward


class TwoLevelTransport:
    """``node_size``: ranks of the job on each node, the same on all ranks (``nodes.agreed_node_size``)."""

    name = "two-level"
    needs_table = True

    def __init__(self, node_size: int) -> None:
        if node_size < 1:
            raise ValueError(f"node_size={node_size}: a node has one rank at least; give the ranks of a node")
        self.node_size = node_size
        self._collective = CollectiveTransport()
        self._nodes: dict[str, Nodes | None] = {}
        self._lane: HostLane | None = None
        self._streams: dict[torch.device, Any] = {}
        self._said: set[str] = set()
        #: This rank's part of exchanges, by group and table; the oldest goes when there are too many.
        self.plans: OrderedDict[Any, TwoLegs] = OrderedDict()

    def prepare(self, group: Any) -> Choice[bool]:
        """Finds the group's nodes. False with the reason when they are not alike."""
        nodes, reason = nodes_of(dist.get_process_group_ranks(group), self.node_size)
        self._nodes[group.group_name] = nodes
        return Choice(nodes is not None, reason)

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
        table: Table | None = None,
    ) -> PendingWork:
        """Starts both legs without blocking the host. Both tensors must be contiguous."""
        if group.group_name not in self._nodes:
            self.prepare(group)
        nodes, world = self._nodes[group.group_name], dist.get_world_size(group)
        if table is None and input_splits is None:
            table = [[source.shape[0] // world] * world] * world
        missing = _missing(nodes, table)
        if missing or nodes is None or table is None:
            self._say(missing, group)
            return self._collective.start(output, source, output_splits, input_splits, group)
        own = dist.get_rank(group)
        legs = self.planned(table, nodes, own, group.group_name)
        middle = source.new_empty((legs.middle_rows, *source.shape[1:]))
        buffers: Buffers = {"source": source, "middle": middle, "output": output}
        begun = FirstLeg(legs, buffers, group)
        row_bytes = math.prod(source.shape[1:]) * source.element_size()
        inside, across = (rows * row_bytes for rows in legs.rows_sent(own, nodes))
        kind = HostLegs(begun, self._host_lane()) if source.device.type == "cpu" else self._on_streams(begun)
        kind.leg_bytes = inside, across
        return kind

    def planned(self, table: Table, nodes: Nodes, own: int, group: str) -> TwoLegs:
        """``plan_legs``, kept: a dispatch and the backward of its combine have one table, the way back the other."""
        key = group, tuple(map(tuple, table))
        legs = self.plans.get(key)
        if legs is None:
            legs = self.plans[key] = plan_legs(table, nodes, own)
            if len(self.plans) > _MOST_PLANS:
                self.plans.popitem(last=False)
        else:
            self.plans.move_to_end(key)
        return legs

    def _on_streams(self, begun: FirstLeg) -> StreamLegs:
        device = begun.buffers["source"].device
        if device not in self._streams:
            self._streams[device] = torch.get_device_module(device).Stream(device=device)
        return StreamLegs(begun, self._streams[device])

    def _host_lane(self) -> HostLane:
        if self._lane is None:
            self._lane = HostLane("second legs")
        return self._lane

    def _say(self, missing: str, group: Any) -> None:
        if missing not in self._said:
            self._said.add(missing)
            where = f"two-level in the group of ranks {dist.get_process_group_ranks(group)}"
            Choice(self._collective.name, missing).announce(where)

    def close(self) -> None:
        """Ends the thread; nothing may be under way."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
        self._nodes.clear()
        self.plans.clear()


def _missing(nodes: Nodes | None, table: Table | None) -> str:
    """Why an exchange goes in one leg; empty when it goes in two."""
    if nodes is None:
        return "its nodes are not alike"
    if not nodes.two_levels:
        return f"it has {nodes.count} node(s) of {nodes.size} rank(s), so one of the legs is empty"
    return "" if table is not None else "the exchange has no table of all ranks' rows"


class FirstLeg:
    """The first leg under way, and the calls of the second."""

    def __init__(self, legs: TwoLegs, buffers: Buffers, group: Any) -> None:
        self.buffers = buffers
        self.after = legs.after
        self.first = issue(_calls(legs.first, buffers, group, 1))
        self.then = _calls(legs.second, buffers, group, 2)
        for copy in legs.before:
            self.copy(copy)

    def copy(self, copy: Copy) -> None:
        """Own rows, on the current stream."""
        if copy.source.rows:
            source, target = (_rows(self.buffers, piece) for piece in (copy.source, copy.target))
            target.copy_(source)

    def finish(self) -> None:
        """Both legs have landed."""
        for copy in self.after:
            self.copy(copy)
        self.buffers.clear()


class HostLegs:
    """On a host: a thread waits for the first leg and issues the second."""

    leg_bytes: tuple[int, int]

    def __init__(self, begun: FirstLeg, lane: HostLane) -> None:
        self.begun = begun
        self.second: list[Any] = []
        self.mark = self.follow(lane)

    def follow(self, lane: HostLane) -> Mark:
        """Gives the lane the second leg; the mark is where it has been issued."""
        lane.submit(self._follow)
        return lane.mark()

    def _follow(self) -> None:
        for work in self.begun.first:
            work.wait()
        self.second = issue(self.begun.then)

    def wait(self) -> None:
        self.mark.wait()
        for work in self.second:
            work.wait()
        self.begun.finish()


class StreamLegs:
    """On an accelerator: a stream waits for the first leg, and the second is issued from it."""

    leg_bytes: tuple[int, int]

    def __init__(self, begun: FirstLeg, stream: Any) -> None:
        self.begun = begun
        module = torch.get_device_module(stream.device)
        stream.wait_stream(module.current_stream(stream.device))  # copies of own rows are sent on by the second leg
        with module.stream(stream):
            for work in begun.first:
                work.wait()
            self.second = issue(begun.then)

    def wait(self) -> None:
        for work in (*self.begun.first, *self.second):
            work.wait()
        self.begun.finish()


def _calls(leg: Leg, buffers: Buffers, group: Any, tag: int) -> list[Any]:
    """The messages with bytes. gloo matches those of a pair by tag and in order, so each leg has its own tag."""
    kinds: tuple[tuple[Callable[..., Any], list[Any]], ...] = ((dist.isend, leg.sends), (dist.irecv, leg.receives))
    return [
        dist.P2POp(kind, rows, dist.get_global_rank(group, piece.peer), group, tag)
        for kind, pieces in kinds
        for piece in pieces
        if piece.rows and (rows := _rows(buffers, piece)).numel()
    ]


def issue(calls: list[Any]) -> list[Any]:
    """Starts the messages, none of which waits for another."""
    return list(dist.batch_isend_irecv(calls)) if calls else []


def _rows(buffers: Buffers, piece: Any) -> torch.Tensor:
    return buffers[piece.buffer].narrow(0, piece.start, piece.rows)

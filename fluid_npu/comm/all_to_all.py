"""AllToAll as a differentiable handle: two autograd nodes, launch and wait, whose backwards swap roles.

Forward: *launch* starts the exchange and returns the receive buffer; *wait* completes it. Backward: the wait's
backward launches the reverse exchange; the launch's backward lets queued work run beside it, then waits. What is
recorded between the two in forward runs between them in backward. In the *serialised twin* every launch
waits at once; nothing else differs.

R rows of the local tensor; splits are rows per rank of the group, in rank order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.cargo import AS_IS, Loading, Unloading
from fluid_npu.comm.guard import collective
from fluid_npu.comm.legs import NodeLeg
from fluid_npu.comm.sink import DirectSink, OverlapSink, Passengers
from fluid_npu.comm.transports import Landing, PendingWork, Table, Transport
from fluid_npu.comm.transports.base import begin
from fluid_npu.device import device_of


@dataclass(frozen=True)
class Peers:
    """A process group and what is asked of it at every exchange; looked up once."""

    group: Any
    ranks: tuple[int, ...]
    """Global ranks in the group's order."""
    index: int
    """This rank's place among them."""

    @staticmethod
    def of(group: Any) -> Peers:
        """The peers of a torch.distributed group that this rank belongs to."""
        return Peers(group, tuple(dist.get_process_group_ranks(group)), dist.get_rank(group))


@dataclass(frozen=True, kw_only=True)
class Route:
    """Who sends how many rows to whom, and what the exchange is called."""

    peers: Peers
    output_splits: Sequence[int] | None
    input_splits: Sequence[int] | None
    comm_type: str
    label: str = ""
    plain_bytes: tuple[int, int] | None = None
    """Bytes to other ranks, there and back, if every (token, expert) had a row; None where every one has."""
    table: Table | None = None
    """[source][target] rows of all ranks, where they are known: a transport that has memory of its own needs them."""
    leg: NodeLeg | None = None
    """Which leg of a dispatch by nodes it is; None for none."""

    @property
    def name(self) -> str:
        """For messages and records: "moe_dispatch AllToAll of layer 3"."""
        return f"{self.comm_type} AllToAll{f' of {self.label}' if self.label else ''}"

    def reversed(self, comm_type: str = "") -> Route:
        """The way back, under another name; without one the way of the gradient."""
        return Route(
            peers=self.peers,
            output_splits=self.input_splits,
            input_splits=self.output_splits,
            comm_type=comm_type or f"{self.comm_type}_backward",
            label=self.label,
            plain_bytes=None if self.plain_bytes is None else (self.plain_bytes[1], self.plain_bytes[0]),
            table=None if self.table is None else list(zip(*self.table, strict=True)),
            leg=None if self.leg is None else self.leg.reversed(),
        )


class Flight:
    """One exchange under way in one direction. Keeps both buffers alive until it has landed.

    ``into``: the receive buffer, contiguous rows such as a part of a larger one; None makes one.
    """

    def __init__(
        self, source: torch.Tensor, route: Route, name: str, sink: OverlapSink, into: torch.Tensor | None = None
    ) -> None:
        self.name = name
        self._sink = sink
        self._comm_type = route.comm_type
        self._ranks = route.peers.ranks
        self._source: torch.Tensor | None = source.contiguous()
        device = device_of(source)
        self._launched, self._reached, self._passed = device.event(), device.event(), device.event()
        sent = _bytes_to_peers(source, route)
        sink.comm.count(route.comm_type, sent, route.plain_bytes[0] if route.plain_bytes is not None else None)
        sink.recorder.add("launch", name)
        self._launched.record()
        with collective(name, self._ranks):
            self.output, self._work, self._landing = _start(self._source, route, sink.transport, into)
        leg = route.leg
        if leg is None:
            sink.comm.count_legs(getattr(self._work, "leg_bytes", None))
        else:
            sink.comm.count_legs(leg.sent(sent), leg.plain[0])
        if sink.serialised or torch.is_anomaly_enabled():
            # Anomaly mode reads what a node returns, which must not still be in flight.
            self.land(at_once=True)

    def give_back(self, made: tuple[Any, ...]) -> tuple[Any, ...]:
        """``made`` of the received rows, after which their memory, where it is the transport's, is the transport's."""
        if self._landing is None:
            return made
        apart = tuple(_apart(tensor, self.output) for tensor in made)
        self._landing.release()
        self._landing = None
        return apart

    def land(self, at_once: bool = False) -> torch.Tensor:
        """The received rows, once they are there; a second call does not wait again."""
        if self._work is None:
            return self.output
        self._reached.record()
        with collective(self.name, self._ranks):
            self._work.wait()
        self._passed.record()
        self._work = self._source = None
        self._sink.recorder.add("wait", self.name, at_once=at_once)
        self._sink.comm.timed(self._comm_type, self._launched, self._reached, self._passed, at_once)
        return self.output


def _start(
    source: torch.Tensor, route: Route, transport: Transport, into: torch.Tensor | None
) -> tuple[torch.Tensor, PendingWork | None, Landing | None]:
    """The receive buffer and the exchange; the third is there when the buffer is memory of the transport."""
    group, land = route.peers.group, getattr(transport, "land", None)
    if into is None and land is not None and route.table is not None:
        landing: Landing | None = land(source, route.table, group)
        if landing is not None:
            return landing.rows, landing, landing
    output = _receive_buffer(source, route) if into is None else into
    splits = route.output_splits, route.input_splits
    return output, begin(transport, output, source, splits, group, route.table), None


def _apart(tensor: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """The tensor in memory of its own, with the same strides."""
    if tensor is None or tensor.untyped_storage()._cdata != rows.untyped_storage()._cdata:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _receive_buffer(source: torch.Tensor, route: Route) -> torch.Tensor:
    rows = source.shape[0] if route.output_splits is None else sum(route.output_splits)
    return source.new_empty((rows, *source.shape[1:]))


def _bytes_to_peers(source: torch.Tensor, route: Route) -> int:
    splits, peers = route.input_splits, route.peers
    own = source.shape[0] // len(peers.ranks) if splits is None else splits[peers.index]
    return (source.shape[0] - own) * math.prod(source.shape[1:]) * source.element_size()


class _Exchange:
    """What the four ends of one differentiable AllToAll share. One object a call: backward may run on any thread."""

    def __init__(
        self, route: Route, loading: Loading, unloading: Unloading, sink: OverlapSink, passengers: Passengers | None
    ) -> None:
        self.route = route
        self.loading = loading
        self.unloading = unloading
        self.sink = sink
        self.passengers = passengers
        self._forward: Flight | None = None
        self._backward: Flight | None = None

    def start_forward(self, tensors: Sequence[torch.Tensor]) -> None:
        self._forward = Flight(self.loading.load(*tensors), self.route, self.route.name, self.sink)

    def land_forward(self) -> tuple[torch.Tensor, ...]:
        assert self._forward is not None, "an AllToAll is waited for once"
        flight, self._forward = self._forward, None
        return flight.give_back(self.unloading.unload(flight.land()))

    def start_backward(self, grads: Sequence[torch.Tensor]) -> None:
        rows = self.unloading.load_grad(*grads)
        self._backward = Flight(rows, self.route.reversed(), f"backward of {self.route.name}", self.sink)

    def land_backward(self) -> tuple[torch.Tensor | None, ...]:
        """Fills the flight of the gradient, then lands it."""
        assert self._backward is not None, "the wait's backward launches the exchange"
        flight, self._backward = self._backward, None
        self.sink.fill(self.route.comm_type, self.route.name)
        return flight.give_back(self.loading.unload_grad(flight.land()))


class _Launch(torch.autograd.Function):
    """Returns a token, not the buffer: the edge to the wait carries order only, since with uneven splits the two
    directions differ in shape and autograd would refuse the one as the other's gradient."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, count: int, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.exchange = exchange
        exchange.start_forward(inputs[:count])
        return inputs[0].new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _token: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        passengers = ctx.exchange.passengers
        grads = ctx.exchange.land_backward()
        return (None, None, *grads, *(passengers.collect() if passengers is not None else ()))


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, exchange: _Exchange) -> Any:
        ctx.exchange = exchange
        tensors = exchange.land_forward()
        return tensors if len(tensors) > 1 else tensors[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.start_backward(grads)
        return grads[0].new_empty(0), None


class AllToAllHandle:
    """An AllToAll in flight; ``wait()`` gives what was received, once or many times."""

    def __init__(self, token: torch.Tensor, exchange: _Exchange) -> None:
        self._token = token
        self._exchange = exchange
        self._result: Any = None

    def wait(self) -> Any:
        """The received tensor, or the tensors of its unloading. The input must not be written before this returns."""
        if self._result is None:
            self._result = _Wait.apply(self._token, self._exchange)
        return self._result


def start_exchange(
    route: Route,
    tensors: Sequence[torch.Tensor],
    *,
    loading: Loading = AS_IS,
    unloading: Unloading = AS_IS,
    sink: OverlapSink | None = None,
    passengers: Passengers | None = None,
) -> AllToAllHandle:
    """Starts an AllToAll of what ``loading`` makes of the tensors; the splits of ``route`` are taken as right.

    Raises CollectiveError when a peer died or did not arrive in time.
    """
    exchange = _Exchange(route, loading, unloading, sink if sink is not None else DirectSink(), passengers)
    weights = passengers.weights if passengers is not None else ()
    return AllToAllHandle(_Launch.apply(exchange, len(tensors), *tensors, *weights), exchange)


def fluid_all_to_all(
    group: Any,
    tensor: torch.Tensor,
    output_splits: Sequence[int] | None,
    input_splits: Sequence[int] | None,
    comm_type: str = "moe_dispatch",
    async_op: bool = False,
    *,
    label: str = "",
    sink: OverlapSink | None = None,
    passengers: Passengers | None = None,
) -> torch.Tensor | AllToAllHandle:
    """Exchanges rows between the ranks of ``group``; differentiable in both forms.

    Args:
        group: a torch.distributed process group.
        tensor: ``[R, ...]``, rows ordered by destination rank.
        output_splits: rows received from each rank; None for equal splits.
        input_splits: rows sent to each rank, sum R; None for equal splits.
        comm_type: name under which bytes and milliseconds are counted.
        async_op: True returns an ``AllToAllHandle``, False the received tensor.
        label: where the exchange belongs ("layer 3"), for error messages.
        sink: the engine that fills the flight of the backward; None for none.
        passengers: weights whose gradients the launch's backward delivers.

    Returns:
        ``[sum(output_splits), ...]`` or a handle for it; the dtype of ``tensor``.

    Raises:
        ValueError: splits whose length is not the group's size, whose sum is not R, or negative ones.
        CollectiveError: a peer died or did not arrive in time; names the exchange and the ranks waited for.
    """
    peers = Peers.of(group)
    world = len(peers.ranks)
    output_splits = _checked("output_splits", output_splits, world, None, tensor.shape[0])
    input_splits = _checked("input_splits", input_splits, world, tensor.shape[0], tensor.shape[0])
    if (output_splits is None) != (input_splits is None):
        raise ValueError("output_splits and input_splits must both be given or both be None")
    route = Route(peers=peers, output_splits=output_splits, input_splits=input_splits, comm_type=comm_type, label=label)
    handle = start_exchange(route, [tensor], sink=sink, passengers=passengers)
    return handle if async_op else handle.wait()


def _checked(name: str, splits: Any, world: int, total: int | None, rows: int) -> list[int] | None:
    """The splits as a list of int. ``total`` is the sum they must have, if known."""
    if splits is None:
        if rows % world:
            raise ValueError(f"{name}=None needs rows divisible by {world} ranks, got {rows}; give split sizes")
        return None
    values = splits if type(splits) is list else [int(value) for value in splits]
    if len(values) != world:
        raise ValueError(f"{name}={values}: one entry for each of the {world} ranks of the group is needed")
    if min(values) < 0:
        raise ValueError(f"{name}={values}: a negative number of rows cannot be sent")
    if total is not None and sum(values) != total:
        raise ValueError(f"{name}={values} sums to {sum(values)}, but tensor has {total} rows")
    return values

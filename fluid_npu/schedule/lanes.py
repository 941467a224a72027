"""Clocks on one scheduler's AllToAlls and on what runs beside them, for some steps.

    with Lanes(scheduler, device, shared_experts) as lanes:
        lanes.begin()
        step()
        exchanges = lanes.take()

Two lanes of time: communication, from the launch of each exchange to the end of its wait, and compute, the pieces
that run, or in the serialised twin could run, in a flight: dW tasks, the shared experts of a layer, the chunks of a
pipeline. A piece belongs to the exchange that was launched last before it, in a pipeline to all those of the
pipeline that are launched and not yet used. Times come from the device's events, so they are read after
the step; while it runs the cost is an event or two a piece.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fluid_npu.comm.guard import watch
from fluid_npu.comm.transports.base import Table, begin
from fluid_npu.device import Device
from fluid_npu.device.base import TimingEvent
from fluid_npu.schedule.definitions import Exchange
from fluid_npu.schedule.scheduler import BackwardScheduler
from fluid_npu.schedule.task import DWTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of one lane, 'compute' or 'communication', in ms from ``Lanes.begin``."""

    lane: str
    name: str
    start_ms: float
    end_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cargo:
    """What an exchange carries, enough to send as much again by itself."""

    output_shape: torch.Size
    source_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    output_splits: Sequence[int] | None
    input_splits: Sequence[int] | None
    group: Any


@dataclasses.dataclass
class _Piece:
    name: str
    number: int
    start: TimingEvent
    end: TimingEvent


@dataclasses.dataclass
class _Open:
    """An exchange of which only events are known yet."""

    name: str
    ranks: tuple[int, ...]
    group: Any
    bytes_to_peers: int
    cargo: Cargo
    at_once: bool
    launched: TimingEvent
    reached: TimingEvent
    passed: TimingEvent
    origin: TimingEvent
    pipeline: str
    beside: list[_Piece] = dataclasses.field(default_factory=list)


class Lanes:
    """Context manager; at most one at a time on a scheduler.

    Args:
        scheduler: whose AllToAlls and tasks are timed.
        device: gives the events.
        modules: modules whose forward and backward run in a flight, such as shared experts.
    """

    def __init__(self, scheduler: BackwardScheduler, device: Device, modules: Sequence[torch.nn.Module] = ()) -> None:
        self._scheduler, self._device, self._modules = scheduler, device, modules
        self._flights: list[_Open] = []
        self._steps: list[list[_Open]] = []
        self._filling = False
        self._undo: list[Callable[[], Any]] = []
        self._origin = device.event()

    def __enter__(self) -> Lanes:
        scheduler, transport = self._scheduler, self._scheduler.transport
        submit, fill, again = scheduler.submit, scheduler.fill, scheduler.fill_again

        def timed_submit(task: DWTask) -> None:
            submit(dataclasses.replace(task, run=lambda: self._run(task)))

        def timed(filling: Callable[..., None]) -> Callable[..., None]:
            def timed_fill(*args: Any, **kwargs: Any) -> None:
                self._filling = True
                try:
                    filling(*args, **kwargs)
                finally:
                    self._filling = False

            return timed_fill

        scheduler.submit = timed_submit  # type: ignore[method-assign]
        scheduler.fill, scheduler.fill_again = timed(fill), timed(again)  # type: ignore[method-assign]
        scheduler.computing = self._computing  # type: ignore[method-assign]
        scheduler.transport = _ClockedTransport(transport, self)

        def restore() -> None:
            scheduler.transport = transport
            del scheduler.submit, scheduler.fill, scheduler.fill_again, scheduler.computing

        self._undo = [restore]
        for module in self._modules:
            self._watch(module)
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def begin(self) -> None:
        """A step begins: what comes belongs to it, and the clock of ``spans`` starts."""
        self._flights = []
        self._pieces = 0
        self._steps.append(self._flights)
        self._origin = self._device.event()
        self._origin.record()

    def take(self) -> list[Exchange]:
        """The exchanges since ``begin`` in the order of their launches. Waits for the device."""
        return [_exchange(flight) for flight in self._flights]

    def take_steps(self) -> list[list[Exchange]]:
        """As ``take``, for every step since the last call; forgets all but the last."""
        steps, self._steps = self._steps, [self._flights]
        return [[_exchange(flight) for flight in flights] for flights in steps if flights]

    def cargo(self) -> list[Cargo]:
        """What the exchanges since ``begin`` carry."""
        return [flight.cargo for flight in self._flights]

    def spans(self) -> list[Span]:
        """Both lanes since ``begin``."""
        found: list[Span] = []
        seen: set[int] = set()
        for flight in self._flights:
            found.append(self._span("communication", flight.name, flight.launched, flight.passed))
            new = [piece for piece in flight.beside if piece.number not in seen]
            found += [self._span("compute", piece.name, piece.start, piece.end) for piece in new]
            seen.update(piece.number for piece in new)
        return found

    def _span(self, lane: str, name: str, start: TimingEvent, end: TimingEvent) -> Span:
        first, last = (event.elapsed_ms(self._origin) for event in (start, end))
        return Span(lane=lane, name=name, start_ms=first, end_ms=last)

    def _run(self, task: DWTask) -> None:
        if not (self._filling and self._flights):
            return task.run()
        piece = self._begin(task.name)
        task.run()
        piece.end.record()

    def _begin(self, name: str) -> _Piece:
        piece = _Piece(name, self._pieces, self._device.event(), self._device.event())
        self._pieces += 1
        piece.start.record()
        for flight in self._in_flight():
            flight.beside.append(piece)
        return piece

    def _in_flight(self) -> list[_Open]:
        """What a piece that begins now may cover."""
        last, names = self._flights[-1], dict(self._scheduler.pipelined)
        if not last.pipeline:
            return [last]
        found = [flight for flight in reversed(self._flights) if names.pop(flight.name, None) is not None]
        return found[::-1]

    @contextmanager
    def _computing(self, name: str) -> Iterator[None]:
        piece = self._begin(name)
        yield
        piece.end.record()

    def _watch(self, module: torch.nn.Module) -> None:
        """Times a module's forward and backward."""
        open_pieces: dict[str, _Piece] = {}
        kind = type(module).__name__

        def enter(part: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if self._flights:
                    open_pieces[part] = self._begin(f"{kind} {part}")

            return hook

        def leave(part: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if part in open_pieces:
                    open_pieces.pop(part).end.record()

            return hook

        handles = (
            module.register_forward_pre_hook(enter("forward")),
            module.register_forward_hook(leave("forward")),
            module.register_full_backward_pre_hook(enter("backward")),
            module.register_full_backward_hook(leave("backward")),
        )
        self._undo += [handle.remove for handle in handles]

    def _launch(self, cargo: Cargo) -> _Open:
        group = cargo.group
        current, event = watch.current, self._device.event
        name = current.name if current is not None else "AllToAll"
        ranks = tuple(dist.get_process_group_ranks(group))
        flight = _Open(
            name=name,
            ranks=ranks,
            group=group,
            bytes_to_peers=_bytes_to_peers(cargo, dist.get_rank(group), len(ranks)),
            cargo=cargo,
            at_once=self._scheduler.serialised,
            origin=self._origin,
            pipeline=self._scheduler.pipelined.get(name, ""),
            launched=event(),
            reached=event(),
            passed=event(),
        )
        self._flights.append(flight)
        flight.launched.record()
        return flight


class _ClockedTransport:
    """The inner transport; every exchange is entered in the lanes."""

    def __init__(self, inner: Any, lanes: Lanes) -> None:
        self.name, self._inner, self._lanes = inner.name, inner, lanes
        self.needs_table = getattr(inner, "needs_table", False)

    def start(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] | None,
        input_splits: Sequence[int] | None,
        group: Any,
        table: Table | None = None,
    ) -> _ClockedWork:
        cargo = Cargo(
            output_shape=output.shape,
            source_shape=source.shape,
            dtype=source.dtype,
            device=source.device,
            output_splits=output_splits,
            input_splits=input_splits,
            group=group,
        )
        flight = self._lanes._launch(cargo)
        return _ClockedWork(begin(self._inner, output, source, (output_splits, input_splits), group, table), flight)


class _ClockedWork:
    def __init__(self, work: Any, flight: _Open) -> None:
        self._work, self._flight = work, flight
        self.leg_bytes: tuple[int, int] | None = getattr(work, "leg_bytes", None)

    def wait(self) -> Any:
        self._flight.reached.record()
        result = self._work.wait()
        self._flight.passed.record()
        return result


def _exchange(flight: _Open) -> Exchange:
    ends = [flight.passed, *(piece.end for piece in flight.beside)] if flight.pipeline else []
    return Exchange(
        name=flight.name,
        ranks=flight.ranks,
        bytes_to_peers=flight.bytes_to_peers,
        flight_ms=flight.passed.elapsed_ms(flight.launched),
        wait_ms=flight.passed.elapsed_ms(flight.reached),
        beside=tuple((piece.name, piece.end.elapsed_ms(piece.start)) for piece in flight.beside),
        at_once=flight.at_once,
        pieces=tuple(piece.number for piece in flight.beside) if flight.pipeline else (),
        pipeline=flight.pipeline,
        start_ms=flight.launched.elapsed_ms(flight.origin) if flight.pipeline else 0.0,
        until_ms=max((end.elapsed_ms(flight.origin) for end in ends), default=0.0),
        group=flight.group,
    )


def _bytes_to_peers(cargo: Cargo, index: int, world: int) -> int:
    rows, splits = cargo.source_shape[0], cargo.input_splits
    own = rows // world if splits is None else splits[index]
    return (rows - own) * math.prod(cargo.source_shape[1:]) * cargo.dtype.itemsize

"""One MoE layer's dispatch, experts and combine in chunks of local experts or of tokens, so that each hides the others.

Forward, for three chunks (one line is one resource):

    communication   D0 D1 D2 C0 C1 C2
    compute         shared    E0 E1 E2           then one sum for each token, in the order of one piece

Backward, mirrored:

    communication   C0 C1 C2 D0 D1 D2            the reverses of both
    compute         carried   E0 E1 E2 dW        dX of each chunk; dW of all chunks beside the last dispatches

With local rows first a chunk before the others, L, holds what stays on this rank. No exchange is of it, so its FC1 and
activation are computed while the first dispatch flies and its FC2, L', while the last combine does; in backward all of
it while the first combine's reverse flies:

    communication   D0 D1 C0 C1          backward   C0 C1 D0 D1
    compute         L  E0 E1 L'                     L  E0 E1 dW

Two autograd nodes: the launch, whose backward lands the dispatches' gradients, and the run. What a caller records
between the two (shared experts) runs between them in the backward too. The order inside a node is written out here, so
it is the same on all ranks. No dW is split along tokens: a chunk holds whole experts, whose rows and their order are
those of the layer in one piece, or chunks share their experts, as with L, and dW is of all rows (``kernels.pieces``).

T tokens, N rows of this rank before the dispatch, R rows of its experts, H hidden, W payload width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fluid_npu.comm.all_to_all import Flight, Route
from fluid_npu.comm.cargo import Loading, Unloading
from fluid_npu.device.kernels.beside import beside_exchange
from fluid_npu.device.kernels.groups import Groups
from fluid_npu.device.kernels.pieces import DWPart, PieceRows
from fluid_npu.ops.expert_mlp import ExpertMLP, WeightGradTarget, kept_of, mlp_backward, mlp_down, mlp_up
from fluid_npu.schedule.deferred import DeferredWeights
from fluid_npu.schedule.scheduler import BackwardScheduler


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some local experts of every rank with their rows, or the rows of some tokens, or the rows that stay here."""

    label: str
    """For records: "layer 3 chunk 1 of 2"."""
    rows: slice
    """Of the N rows."""
    experts: slice
    """Of the local experts."""
    dispatch: Route | None
    """None with that of the combine: its rows stay on this rank."""
    combine: Route | None
    pack: Callable[[Tensor, Tensor], Tensor]
    """From tokens and probabilities to the payload rows that are sent."""
    unpack: Unloading
    """From payload rows to the experts' rows and their probabilities."""
    collect: Loading
    """From the experts' outputs to the rows that go back."""
    spread: Callable[[Tensor], Tensor]
    """From the output's gradient to this chunk's rows."""
    mlp: ExpertMLP


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What one forward and backward of a layer in chunks needs.

    Rows of a chunk's dispatch, and of its combine's gradient, may land in memory of the transport, which has room for
    two exchanges; what returns (``fly(into=...)``) does not.
    """

    chunks: Sequence[Chunk]
    gather: Callable[[Iterable[Tensor]], tuple[Tensor | None, ...]]
    """From the gradients of payload rows to those of tokens and probabilities: of each chunk, asked for one after the
    other as they are used, since each waits for its exchange; of all N rows as one where they lie ``in_one``."""
    merge: Callable[[Iterable[Tensor]], Tensor]
    """From the rows that came back to tokens, likewise."""
    in_one: bool = True
    """Whether all chunks' rows land in one buffer."""
    shared: PieceRows | None = None
    """The rows of all experts in each chunk, where chunks share their experts."""
    w1_LHF: Tensor
    w2_LFH: Tensor
    """Constants for autograd: ``deferred`` takes their gradients."""
    deferred: DeferredWeights | None
    """None where no gradient is asked for."""
    sink: BackwardScheduler
    name: str
    """For records: "layer 3"."""

    def weights_of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """FC1 and FC2 of a chunk's experts."""
        return self.w1_LHF[chunk.experts], self.w2_LFH[chunk.experts]

    def fly(self, rows: Tensor, route: Route | None, *, back: bool = False, into: Tensor | None = None) -> _OnTheWay:
        """Starts an exchange or, ``back``, the reverse of one for the gradient; without a route rows stay here."""
        if route is None:
            return _Here(rows, into)
        name = f"backward of {route.name}" if back else route.name
        self.sink.pipelined[name] = f"{'backward of ' if back else ''}AllToAlls of {self.name}"
        return Flight(rows, route.reversed() if back else route, name, self.sink, into=into)

    def start(self, fly: Callable[[Chunk], _OnTheWay]) -> list[_OnTheWay]:
        """``fly`` of each chunk, in their order; what is exchanged goes first, so that what stays is made meanwhile."""
        started: dict[int, _OnTheWay] = {}
        for number in sorted(range(len(self.chunks)), key=lambda number: self.chunks[number].dispatch is None):
            started[number] = fly(self.chunks[number])
        return [started[number] for number in range(len(self.chunks))]

    def land(self, flight: _OnTheWay) -> Tensor:
        """The rows of an exchange, which are used from here on."""
        self.sink.pipelined.pop(flight.name, None)
        return flight.land()

    @property
    def num_rows(self) -> int:
        """N."""
        return self.chunks[-1].rows.stop

    def launch(self, x_TH: Tensor, probs_TE: Tensor) -> PendingExperts:
        """Starts all dispatches, first to last; ``run`` on the result completes the layer."""
        flights = _Flights()
        weights = self.deferred.passengers.weights if self.deferred is not None else ()
        return PendingExperts(_Launch.apply(self, flights, x_TH, probs_TE, *weights), self, flights)


class PendingExperts:
    """A layer whose dispatches are in flight."""

    def __init__(self, token: Tensor, pipeline: Pipeline, flights: _Flights) -> None:
        self._token, self._pipeline, self._flights = token, pipeline, flights

    def run(self) -> Tensor:
        """Experts and combines; the sum of each token's rows."""
        return _Run.apply(self._token, self._pipeline, self._flights)


class _Here:
    """Rows that stay on this rank, in the place of a flight."""

    name = ""

    def __init__(self, rows: Tensor, into: Tensor | None) -> None:
        self._rows = rows if into is None else into.copy_(rows)

    def land(self) -> Tensor:
        """The rows."""
        return self._rows

    def give_back(self, made: tuple[Any, ...]) -> tuple[Any, ...]:
        """What was made of them: their memory is nobody else's."""
        return made


_OnTheWay: TypeAlias = "Flight | _Here"


def _beside(*flights: Sequence[_OnTheWay]) -> beside_exchange:
    """Around what is computed beside these, in the twin too; rows that stay here are beside nothing."""
    return beside_exchange(any(isinstance(flight, Flight) for some in flights for flight in some))


class _Landing:
    """Exchanges that bring rows back, and where they land: in one buffer, or each in its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._flights: dict[str, _OnTheWay] = {}
        self._whole: Tensor | None = None

    @property
    def flights(self) -> list[_OnTheWay]:
        """Those that were started."""
        return list(self._flights.values())

    def start(self, chunk: Chunk, rows: Tensor, route: Route | None, *, back: bool = False) -> None:
        """Sends a chunk's rows."""
        into = None
        if self._pipeline.in_one:
            if self._whole is None:
                self._whole = rows.new_empty(self._pipeline.num_rows, rows.shape[1])
            into = self._whole[chunk.rows]
        elif route is not None:
            into = rows.new_empty(chunk.rows.stop - chunk.rows.start, rows.shape[1])
        self._flights[chunk.label] = self._pipeline.fly(rows, route, back=back, into=into)

    def landed(self) -> Iterator[Tensor]:
        """The rows of each chunk, in their order, each waited for when it is asked for; in one, all of them as one."""
        for chunk in self._pipeline.chunks:
            rows = self._pipeline.land(self._flights.pop(chunk.label))
            if not self._pipeline.in_one:
                yield rows
        if self._whole is not None:
            yield self._whole


class _Flights:
    """What the two nodes share: the dispatches in flight and, in the backward, their reverses."""

    def __init__(self) -> None:
        self.forward: list[_OnTheWay] = []
        self.backward: _Landing | None = None


class _Launch(torch.autograd.Function):
    """Returns a token: the edge to the run carries order only."""

    @staticmethod
    def forward(
        ctx: Any, pipeline: Pipeline, flights: _Flights, x_TH: Tensor, probs_TE: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.pipeline, ctx.flights = pipeline, flights
        flights.forward = pipeline.start(lambda chunk: pipeline.fly(chunk.pack(x_TH, probs_TE), chunk.dispatch))
        return x_TH.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _token: Tensor) -> tuple[Tensor | None, ...]:
        pipeline, flights = ctx.pipeline, ctx.flights
        landing, flights.backward = flights.backward, None
        pipeline.sink.fill("moe_dispatch", f"moe_dispatch AllToAlls of {pipeline.name}")
        grads = pipeline.gather(landing.landed())
        deferred = pipeline.deferred
        return (None, None, *grads, *(deferred.passengers.collect() if deferred is not None else ()))


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, pipeline: Pipeline, flights: _Flights) -> Tensor:
        ctx.pipeline, ctx.flights = pipeline, flights
        merged, kept = _forward(pipeline, flights, keep=ctx.needs_input_grad[0])
        ctx.kept_each = [len(tensors) for tensors in kept]
        ctx.save_for_backward(*(tensor for tensors in kept for tensor in tensors))
        return merged

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        saved = iter(ctx.saved_tensors)
        kept: list[Sequence[Tensor]] = [[next(saved) for _ in range(number)] for number in ctx.kept_each]
        _backward(ctx.pipeline, ctx.flights, dout.contiguous(), kept)
        return dout.new_empty(0), None, None


def _forward(pipeline: Pipeline, flights: _Flights, keep: bool) -> tuple[Tensor, list[Sequence[Tensor]]]:
    """The merged tokens, and for each chunk what its backward needs."""
    back = _Combines(pipeline, keep)
    staying: list[tuple[Chunk, _Up]] = []
    pipeline.sink.fill_again(f"moe_dispatch AllToAlls of {pipeline.name}", gaps=3)
    for chunk in pipeline.chunks:
        flight = flights.forward.pop(0)
        received = pipeline.land(flight)
        with pipeline.sink.computing(f"{chunk.label} forward"), back.beside(flights.forward):
            up = _up(pipeline, chunk, flight.give_back(chunk.unpack.unload(received)))
            rows = None if chunk.combine is None else back.compute(chunk, up)
        if rows is None:
            staying.append((chunk, up))
        else:
            back.landing.start(chunk, rows, chunk.combine)
        del flight, received, up, rows
    while staying:
        chunk, up = staying.pop(0)
        with pipeline.sink.computing(f"{chunk.label} forward, FC2"), back.beside():
            rows = back.compute(chunk, up)
        back.landing.start(chunk, rows, chunk.combine)
        del up, rows
    pipeline.sink.fill_again(f"moe_combine AllToAlls of {pipeline.name}", gaps=2)
    return pipeline.merge(back.landing.landed()), [back.kept[chunk.label] for chunk in pipeline.chunks if keep]


#: Rows, probabilities, FC1 and activation of a chunk.
_Up: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def _up(pipeline: Pipeline, chunk: Chunk, rows: tuple[Tensor, ...]) -> _Up:
    x_RH, p_R = rows
    return (x_RH, p_R, *mlp_up(x_RH, p_R, pipeline.weights_of(chunk)[0], chunk.mlp))


class _Combines:
    """FC2 of chunks and their combines."""

    def __init__(self, pipeline: Pipeline, keep: bool) -> None:
        self._pipeline, self._keep = pipeline, keep
        self.landing = _Landing(pipeline)
        self.kept: dict[str, Sequence[Tensor]] = {}

    def beside(self, dispatches: Sequence[_OnTheWay] = ()) -> beside_exchange:
        """Around what is computed now: beside these dispatches and the combines that were started."""
        return _beside(dispatches, self.landing.flights)

    def compute(self, chunk: Chunk, up: _Up) -> Tensor:
        """The rows that go back, from a chunk's activation."""
        x, p, h, a = up
        w1, w2 = self._pipeline.weights_of(chunk)
        if self._keep:
            self.kept[chunk.label] = kept_of(x, p, w1, w2, h, a, chunk.mlp)
        return chunk.collect.load(mlp_down(a, w2, chunk.mlp))


def _backward(pipeline: Pipeline, flights: _Flights, dout: Tensor, kept: list[Sequence[Tensor]]) -> None:
    """Leaves the dispatches' gradients in flight and the dW of all chunks queued."""
    assert pipeline.deferred is not None, "without gradients there is no backward"
    combines = pipeline.start(lambda chunk: pipeline.fly(chunk.spread(dout), chunk.combine, back=True))
    pipeline.sink.fill("moe_combine", f"moe_combine AllToAlls of {pipeline.name}")
    weight_grads = _WeightGrads(pipeline.deferred, pipeline.shared)
    landing = flights.backward = _Landing(pipeline)
    for chunk in pipeline.chunks:
        flight = combines.pop(0)
        received = pipeline.land(flight)
        with pipeline.sink.computing(f"{chunk.label} backward"), _beside(combines, landing.flights):
            (dy,) = flight.give_back(chunk.collect.unload_grad(received))
            assert dy is not None
            dx, dp, _, _ = mlp_backward(dy, kept.pop(0), weight_grads.taken_from(chunk.mlp))
            assert dx is not None and dp is not None
            payload = chunk.unpack.load_grad(dx, dp)
        del flight, received, dy, dx, dp
        landing.start(chunk, payload, chunk.dispatch, back=True)
    weight_grads.submit()


class _WeightGrads:
    """Operands of dW from all chunks: one task for each weight, queued when the last chunk is through."""

    def __init__(self, deferred: DeferredWeights, shared: PieceRows | None) -> None:
        self._deferred, self._shared = deferred, shared
        self._parts: tuple[list[DWPart], list[DWPart]] = ([], [])

    def taken_from(self, mlp: ExpertMLP) -> ExpertMLP:
        """``mlp`` with its weight gradients handed over here."""
        return replace(mlp, fc1=self._target(0), fc2=self._target(1))

    def submit(self) -> None:
        """Queues FC2's task, then FC1's."""
        for index in (1, 0):
            if self._deferred.wants(index):
                self._deferred.submit(index, self._parts[index], self._shared)

    def _target(self, index: int) -> WeightGradTarget:
        def take(rows: Tensor, dy: Tensor, counts: Groups) -> None:
            self._parts[index].append(DWPart(rows, dy, counts))

        return WeightGradTarget(defer=take if self._deferred.wants(index) else None)

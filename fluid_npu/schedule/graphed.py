"""One layer's forward and backward as two recordings that the host replays by one call each.

The first calls run as ever (*warm-up*): kernels are chosen, checked and compiled, groups are connected. Then forward
and backward are recorded, on fixed input and gradient buffers, with twins of the parameters: other Parameters of the
same memory. So no hook of a DDP, and no autograd node that a default stream owns, is part of a recording; gradients of
the parameters themselves are handed to autograd at each replay, and hooks fire as ever. What is added to ``main_grad``
is added by the recording, at the address it had.

A replay is right only where shapes, addresses, modes and the scheduler's settings are those that were recorded; all
else runs as ever, with one printed reason. One forward may wait for its backward at a time.

A layer whose sizes depend on its input is recorded with ``Room`` for more. Each replayed forward tells soon whether the
room sufficed; where it did not, what the forward changed is put back and the layer runs as ever.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from fluid_npu.device.choice import Choice
from fluid_npu.device.graphs import GraphRecorder
from fluid_npu.ops.grouped_matmul import placeholder_grad
from fluid_npu.schedule.scheduler import BackwardScheduler

WARM_UP = 3
#: Calls that already keep to the room that is to be recorded, the last ones before it: they choose kernels for it.
_IN_ROOM = 2
#: Calls before any layer is recorded, with room or not.
MOST_WARM_UP = WARM_UP + _IN_ROOM - 1
#: So many of the last so many replays without enough room, and the layer is recorded anew: a few cost less than the
#: spare rows that would have spared them.
_TOO_OFTEN, _OF_LAST = 3, 100

#: The parts of a signature, for messages.
_GIVEN = (
    "shape, dtype or device of the input",
    "a mode or the transport",
    "a clock",
    "a parameter",
    "a buffer",
    "a tensor outside the layer",
)


class Room(Protocol):
    """Sizes that ranks agree on before a layer is recorded with them."""

    def settle(self, x: Tensor) -> str:
        """Agrees on them from the calls so far, the last one's input in hand; why that cannot be, '' where it can."""

    def forget(self) -> None:
        """Nothing is agreed any more."""

    def kept_to(self) -> AbstractContextManager[None]:
        """Inside, a forward keeps to them if they are agreed on, whether they suffice or not."""

    def ask(self, replay: bool) -> None:
        """A forward is to be called, or replayed."""

    def sufficed(self) -> bool:
        """Whether they did on all ranks in that forward; waits until that is known."""


class GraphedLayer:
    """Calls a layer's forward, or replays it.

    Args:
        module: the layer; its parameters and buffers are those that a recording reads.
        forward: what the layer computes: a tensor of one tensor.
        scheduler: the engine of its exchanges and tasks, asked for at each call, since a layer may be bound anew.
        recorder: makes the recorder of this layer; called when it is first needed.
        name: how messages call the layer.
        warm_up: calls with the same shapes and addresses before anything is recorded.
        outside: what else a recording takes for given, such as addresses of tensors that are not the module's.
        agree: called after the attempt with why it failed, '' where it did not; gives why nothing is replayed. For
            ranks that must replay together.
        room: of a layer whose sizes depend on its input.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        forward: Callable[[Tensor], Tensor],
        scheduler: Callable[[], BackwardScheduler],
        recorder: Callable[[], GraphRecorder],
        name: str = "layer",
        warm_up: int = WARM_UP,
        outside: Callable[[], tuple[Tensor | None, ...]] = tuple,
        agree: Callable[[str], str] = str,
        room: Room | None = None,
    ) -> None:
        self._module, self._forward, self._scheduler = module, forward, scheduler
        self._make_recorder, self._name, self._outside = recorder, name, outside
        self._warm_up = warm_up + (0 if room is None else _IN_ROOM - 1)
        self._agree, self._room = agree, room
        self._replays = 0
        self._without_room: deque[int] = deque(maxlen=_TOO_OFTEN)
        self._recording: _Recording | None = None
        self._signature: Any = None
        self._calls = 0
        self._broken = ""

    @property
    def recorded(self) -> bool:
        """Whether there is something to replay."""
        return self._recording is not None

    @property
    def held_bytes(self) -> int:
        """Of what the recording keeps for itself between steps: its memory, input and output gradient; 0 without."""
        return 0 if self._recording is None else self._recording.held_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output, as a tensor of its own."""
        if not torch.is_grad_enabled():
            return self._forward(x)
        reason, lacks_room = self._broken or self._in_the_way(), False
        if not reason and self._warm(x):
            reason = self._why_not_recorded(x) if self._recording is None else self._why_not_replayed(x)
            if not reason:
                recording = self._recording
                assert recording is not None, "recorded just now, or before"
                self._replays += 1
                if recording.forward(x):
                    return _Replay.apply(recording, x, *recording.parameters)
                reason, lacks_room = self._lacked_room(), True
        if reason:
            Choice("as ever", reason).announce(f"graph of {self._name}")
        elif self._room is not None and self._calls == self._warm_up - _IN_ROOM + 1:
            self._broken = self._room.settle(x)
        if self._room is None or lacks_room:
            return self._forward(x)
        return self._called_in(self._room, x)

    def _called_in(self, room: Room, x: Tensor) -> Tensor:
        """As ever, but like the recorded layer where the room suffices: with its kernels, exchanges and bits."""
        changed = self._changed()
        before = [tensor.detach().clone() for tensor in changed]
        room.ask(replay=False)
        with room.kept_to():
            out = self._forward(x)
        if room.sufficed():
            return out
        _put_back(changed, before)
        return self._forward(x)

    def _changed(self) -> list[Tensor]:
        """What a forward may write besides its output."""
        return [*self._module.buffers(), *(tensor for tensor in self._outside() if tensor is not None)]

    def _lacked_room(self) -> str:
        """Why the call runs as ever; the same on all ranks."""
        self._without_room.append(self._replays)
        if len(self._without_room) == _TOO_OFTEN and self._replays - self._without_room[0] < _OF_LAST:
            reason = f"{_TOO_OFTEN} of the last {_OF_LAST} steps needed more room than was recorded"
            Choice("anew", reason).announce(f"graph of {self._name}")
            self._forget()
        return "some rank has more rows for another than there is room for in what was recorded"

    def _forget(self) -> None:
        """Nothing is recorded, and the warm-up begins again."""
        self._recording, self._signature = None, None
        self._without_room.clear()
        if self._room is not None:
            self._room.forget()

    def _in_the_way(self) -> str:
        """What watches this call and would see nothing of a replay."""
        if torch.is_anomaly_enabled():
            return "anomaly mode looks at every node"
        if self._scheduler().recorder.enabled:
            return "the scheduler's recorder is on"
        if torch._C._len_torch_dispatch_stack():
            return "a dispatch mode looks at every operator"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "it is part of a larger recording"
        return ""

    def _warm(self, x: Tensor) -> bool:
        """Whether this call may be recorded or replayed; before there is a recording, counts calls that are alike."""
        if self._recording is not None:
            return True
        signature = self._sign(x)
        if signature != self._signature:
            self._signature, self._calls = signature, 0
            if self._room is not None:
                self._room.forget()
        self._calls += 1
        return self._calls > self._warm_up

    def _sign(self, x: Tensor) -> tuple[Any, ...]:
        """All that a recording takes for given: shapes, addresses, and modes."""
        scheduler = self._scheduler()
        modes = self._module.training, scheduler.serialised, scheduler.overlap, id(scheduler.transport)
        hooked = "submit" in vars(scheduler)  # a clock that ``schedule.lanes`` put there
        buffers = tuple(buffer.data_ptr() for buffer in self._module.buffers())
        given = x.shape, x.dtype, x.device, x.requires_grad
        parameters = tuple(map(_addresses, self._module.parameters()))
        outside = tuple(None if tensor is None else tensor.data_ptr() for tensor in self._outside())
        return given, modes, hooked, parameters, buffers, outside

    def _why_not_replayed(self, x: Tensor) -> str:
        recording = self._recording
        assert recording is not None
        if recording.waits_for_backward:
            return "a forward of this layer still waits for its backward, and a recording has room for one"
        now = self._sign(x)
        if now == self._signature:
            return ""
        changed = (name for name, a, b in zip(_GIVEN, now, self._signature, strict=True) if a != b)
        return f"not as it was recorded: {', '.join(changed)}"

    def _why_not_recorded(self, x: Tensor) -> str:
        """Records; what went wrong, if anything."""
        recording, failed = None, ""
        try:
            recording = self._record(x)
        except RuntimeError as error:
            failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        failed = self._agree(failed)
        if failed:
            self._broken = f"it cannot be recorded ({failed})"
            return self._broken
        self._recording = recording
        Choice("recorded", f"after {self._warm_up} calls alike").announce(f"graph of {self._name}")
        return ""

    def _record(self, x: Tensor) -> _Recording:
        made = self._scheduler(), self._make_recorder()
        return _Recording(self._module, self._forward, *made, x, self._room, self._changed())


class _Recording:
    """Forward and backward with their fixed buffers, and the parameters whose gradients they give."""

    def __init__(
        self,
        module: torch.nn.Module,
        forward: Callable[[Tensor], Tensor],
        scheduler: BackwardScheduler,
        recorder: GraphRecorder,
        x: Tensor,
        room: Room | None,
        changed: Sequence[Tensor],
    ) -> None:
        """``changed``: what a forward may write besides its output."""
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.scheduler = scheduler
        self._recorder = recorder
        self._pending: weakref.ref[_Token] | None = None
        self._out: Tensor | None = None
        self._room, self._changed = room, list(changed) if room is not None else []
        self._before: list[Tensor] = []
        twins = {parameter: _twin(parameter) for parameter in module.parameters()}
        # Copied, not empty: a recorder may compute while it records.
        self.x = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)

        def forward_body() -> Tensor:
            self._before = [tensor.detach().clone() for tensor in self._changed]
            kept = nullcontext() if room is None else room.kept_to()
            with kept, scheduler.tallied() as self.forward_tally, _swapped(module, twins), torch.enable_grad():
                self._out = forward(self.x)
            return self._out.detach()

        def backward_body() -> tuple[Tensor | None, ...]:
            out, self._out = self._out, None
            assert out is not None, "a backward follows its forward"
            leaves = [self.x, *(twins[parameter] for parameter in self.parameters)]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            with scheduler.tallied() as self.backward_tally:
                found = iter(torch.autograd.grad(out, wanted, self.dy, allow_unused=True))
            return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)

        self.replay_forward, self.out = recorder.record(forward_body)
        self.dy = torch.zeros_like(self.out)
        self.replay_backward, self.grads = recorder.record(backward_body)
        self.fused = [_added(twins[parameter]) for parameter in self.parameters]

    @property
    def held_bytes(self) -> int:
        """Of the recorder's memory, and of the two buffers outside it."""
        return self._recorder.held_bytes() + self.x.nbytes + self.dy.nbytes

    @property
    def waits_for_backward(self) -> bool:
        """Whether the buffers hold a forward whose graph is alive and whose backward has not run."""
        return self._pending is not None and self._pending() is not None

    @torch.no_grad()
    def forward(self, x: Tensor) -> bool:
        """Replays the forward; False where its room did not suffice: then it has changed nothing."""
        self.x.copy_(x)
        if self._room is None:
            self.replay_forward()
            return True
        self._room.ask(replay=True)
        self.replay_forward()
        if self._room.sufficed():
            return True
        _put_back(self._changed, self._before)
        return False

    def begin(self) -> _Token:
        """A forward was replayed."""
        token = _Token()
        self._pending = weakref.ref(token)
        return token

    def end(self, token: _Token) -> None:
        """Its backward is about to be. Raises RuntimeError where it ran already."""
        if self._pending is None or self._pending() is not token:
            raise RuntimeError(
                "backward through a recorded layer a second time: its buffers are used again; "
                "turn the layer's graph off to use retain_graph=True"
            )
        self._pending = None


class _Token:
    """Lives as long as the autograd node of one replayed forward."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.token = recording, recording.begin()
        recording.scheduler.count_again(recording.forward_tally)
        return recording.out.clone()  # the next replay writes there

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        recording: _Recording = ctx.recording
        recording.end(ctx.token)
        recording.dy.copy_(dy)
        recording.replay_backward()
        recording.scheduler.count_again(recording.backward_tally)
        dx, *grads = recording.grads
        # Copies: autograd may keep what it is given as a parameter's ``grad``, and the next replay writes there.
        delivered = [
            _placeholder(parameter, grad) if fused else None if grad is None else grad.clone()
            for parameter, fused, grad in zip(recording.parameters, recording.fused, grads, strict=True)
        ]
        return (None, None if dx is None else dx.clone(), *delivered)


@torch.no_grad()
def _put_back(changed: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for tensor, old in zip(changed, before, strict=True):
        tensor.copy_(old)


def _placeholder(parameter: Any, recorded: Tensor | None) -> Tensor:
    """What autograd is given for a weight whose gradient the replay added to ``main_grad``.

    Nobody reads it, so the recording's own memory will do, unless a hook adds it.
    """
    parameter.grad_added_to_main_grad = True
    if recorded is None or getattr(parameter, "zero_out_wgrad", False):
        return placeholder_grad(parameter)
    return recorded.detach()


def _twin(parameter: Parameter) -> Parameter:
    """Another Parameter of the same memory, with the same attributes and no hooks."""
    twin = Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    vars(twin).update(vars(parameter))
    twin.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return twin


def _added(leaf: Any) -> bool:
    return bool(getattr(leaf, "grad_added_to_main_grad", False))


@contextmanager
def _swapped(module: torch.nn.Module, twins: dict[Parameter, Parameter]) -> Iterator[None]:
    """The module with twins in the places of its parameters."""
    places = [
        (part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    try:
        for table, name, parameter in places:
            table[name] = twins[parameter]
        yield
    finally:
        for table, name, parameter in places:
            table[name] = parameter


def _addresses(parameter: Any) -> tuple[Any, ...]:
    main_grad = getattr(parameter, "main_grad", None)
    return parameter.data_ptr(), parameter.requires_grad, None if main_grad is None else main_grad.data_ptr()

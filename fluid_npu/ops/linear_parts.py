"""A linear layer in parts of its heads, so that each part's exchange may fly while the next is made.

    columns   y_c = x W[part c]^T     one autograd node a part; the last one's backward computes dX of all parts
    rows      y = x W^T, once, of all parts; in the backward dX_c = dy W[:, part c] part by part

Products of rows part by part would add up in fp32, whose memory traffic takes as long as what it could hide. A part of
columns is a list of heads: blocks of ``size`` rows of the weight, anywhere in it. Heads that lie as equal runs at equal
distances are a view of the weight, and one batched product; nothing of the weight is copied, and no table of heads goes
to the device, for which the host would wait. dW is computed once, of all parts, as without parts. R rows of the input
(all dimensions but the last), K inputs, N outputs, D size of a head, n heads of a part, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TakeDW = Callable[[Tensor, Tensor], Any]
"""Takes (x_RK, dy_RN) once in a backward, and computes or keeps dW."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """``count`` runs of ``length`` heads from head ``start`` on, ``step`` apart."""

    start: int
    count: int
    step: int
    length: int

    @property
    def heads(self) -> int:
        """Of all runs."""
        return self.count * self.length

    def of(self, x: Tensor, size: int) -> Tensor:
        """``[count, length * size, ...]``: a view of these heads of ``[heads * size, ...]``."""
        x = x.narrow(0, self.start * size, ((self.count - 1) * self.step + self.length) * size)
        return x.unfold(0, self.length * size, self.step * size).movedim(-1, 1)

    def within(self, y: Tensor, size: int) -> Tensor:
        """The same of the last dimension of ``[..., heads * size]``: ``[..., count, length * size]``."""
        y = y.narrow(-1, self.start * size, ((self.count - 1) * self.step + self.length) * size)
        return y.unfold(-1, self.length * size, self.step * size)


def runs_of(heads: Sequence[int]) -> list[Runs]:
    """The heads in their order, in as few runs as are found from the left."""
    stretches: list[list[int]] = []
    for head in heads:
        if stretches and stretches[-1][-1] + 1 == head:
            stretches[-1].append(head)
        else:
            stretches.append([head])
    found: list[Runs] = []
    for stretch in stretches:
        start, length = stretch[0], len(stretch)
        last = found[-1] if found else None
        if last is not None and last.length == length and _continues(last, start):
            found[-1] = Runs(start=last.start, count=last.count + 1, step=start - _end(last), length=length)
        else:
            found.append(Runs(start=start, count=1, step=length, length=length))
    return found


def _end(runs: Runs) -> int:
    """Where its last run begins."""
    return runs.start + (runs.count - 1) * runs.step


def _continues(runs: Runs, start: int) -> bool:
    """Whether a run that begins at ``start`` is the next one."""
    step = start - _end(runs)
    return step >= runs.length and runs.count == 1 or step == runs.step


class ColumnParts:
    """One forward of a layer whose outputs are computed part by part.

    Args:
        w_NK: the weight, detached.
        parts: heads of each part; together every head once.
        size: D.
        take_dw: see ``TakeDW``; None for a frozen weight.
        gate: an empty tensor that gets a gradient once all parts' backwards are done, or None.
    """

    def __init__(
        self, w_NK: Tensor, parts: Sequence[Sequence[int]], size: int, take_dw: TakeDW | None, gate: Tensor | None
    ) -> None:
        self.w_NK, self.size = w_NK, size
        self.parts = [runs_of(part) for part in parts]
        self.take_dw, self.gate = take_dw, gate
        self._dy_RN: Tensor | None = None
        self._missing = len(self.parts)

    def compute(self, x: Tensor, number: int) -> Tensor:
        """``[..., n * D]``: the outputs of part ``number`` for ``[..., K]``; its heads in the order of the part."""
        y: Tensor = _Columns.apply(x, self.w_NK, self.gate, self, number)
        return y

    def of_part(self, x: Tensor, number: int) -> Tensor:
        """``[n * D]``: a part's entries of a vector ``[N]``, such as a bias."""
        return torch.cat([runs.of(x, self.size).flatten() for runs in self.parts[number]])

    def product(self, x: Tensor, number: int) -> Tensor:
        """As ``compute``, without a graph."""
        x_RK, parts = x.reshape(-1, x.shape[-1]), self.parts[number]
        widths = [runs.heads * self.size for runs in parts]
        y_RN = x.new_empty(x_RK.shape[0], sum(widths))
        for runs, y in zip(parts, y_RN.split(widths, 1), strict=True):
            w_PKN = runs.of(self.w_NK, self.size).transpose(1, 2)
            y_PRN = y.unflatten(1, (runs.count, -1)).transpose(0, 1)
            torch.bmm(x_RK.expand(runs.count, -1, -1), w_PKN, out=y_PRN)
        return y_RN.view(*x.shape[:-1], -1)

    def collect(self, x: Tensor, dy: Tensor, number: int, wants_dx: bool) -> Tensor | None:
        """Takes the gradient of one part; with the last one dX of all parts, and dW is handed over."""
        dy_Rn, parts = dy.reshape(-1, dy.shape[-1]), self.parts[number]
        if self._dy_RN is None:
            self._dy_RN = dy.new_empty(dy_Rn.shape[0], self.w_NK.shape[0])
        for runs, part in zip(parts, dy_Rn.split([runs.heads * self.size for runs in parts], 1), strict=True):
            runs.within(self._dy_RN, self.size).copy_(part.unflatten(1, (runs.count, -1)))
        self._missing -= 1
        if self._missing:
            return None
        dy_RN, self._dy_RN, self._missing = self._dy_RN, None, len(self.parts)
        dx = (dy_RN @ self.w_NK).view(x.shape) if wants_dx else None
        if self.take_dw is not None:
            self.take_dw(x.reshape(-1, x.shape[-1]), dy_RN)
        return dx


class RowParts:
    """One forward of a layer whose inputs come part by part; all parts have as many heads of each of P ranks.

    ``enter`` is called once for each part, in order, then ``compute`` with all that it returned. In the backward dX of
    the last part comes first; with the first part dW is handed over.

    Args:
        w_NK: the weight, detached; K is P times all parts times n * D.
        parts: how many.
        take_dw: see ``TakeDW``; None for a frozen weight.
        gate: an empty tensor that gets a gradient once dW was handed over, or None.
    """

    def __init__(self, w_NK: Tensor, parts: int, take_dw: TakeDW | None, gate: Tensor | None) -> None:
        self.w_NK, self.parts, self.take_dw, self.gate = w_NK, parts, take_dw, gate
        self._entered: list[Tensor] = []
        self._grads: tuple[Tensor, Tensor] | None = None

    def enter(self, x_c: Tensor) -> Tensor:
        """Takes a part ``[..., P, n * D]``; an empty tensor, which carries order."""
        number = len(self._entered)
        token: Tensor = _RowPart.apply(x_c, None if number else self.gate, self, number)
        self._entered.append(x_c.detach())
        return token

    def compute(self, tokens: Sequence[Tensor]) -> Tensor:
        """``[..., N]`` of all parts."""
        y: Tensor = _Rows.apply(self.w_NK, self, *tokens)
        return y

    def whole(self) -> Tensor:
        """``[..., K]``: of each rank its heads of every part; the parts are forgotten."""
        entered, self._entered = self._entered, []
        return torch.stack(entered, -2).flatten(-3)

    def start_backward(self, x_RK: Tensor, dy_RN: Tensor) -> None:
        """Keeps what the parts' gradients need."""
        self._grads = x_RK, dy_RN

    def part_grad(self, shape: Sequence[int], number: int) -> Tensor:
        """dX ``[..., P, n * D]`` of a part."""
        assert self._grads is not None, "the product's backward comes first"
        dy_RN, (ranks, width) = self._grads[1], shape[-2:]
        w_PNn = self.w_NK.view(self.w_NK.shape[0], ranks, self.parts, width)[:, :, number].movedim(1, 0)
        dx_RPn = dy_RN.new_empty(dy_RN.shape[0], ranks, width)
        torch.bmm(dy_RN.expand(ranks, -1, -1), w_PNn, out=dx_RPn.transpose(0, 1))
        return dx_RPn.view(shape)

    def hand_over(self) -> None:
        """Gives dW away, and forgets what it is made of."""
        assert self._grads is not None, "the product's backward comes first"
        (x_RK, dy_RN), self._grads = self._grads, None
        if self.take_dw is not None:
            self.take_dw(x_RK, dy_RN)


class _RowPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_c: Tensor, gate: Tensor | None, call: RowParts, number: int) -> Tensor:
        ctx.call, ctx.number, ctx.shape = call, number, x_c.shape
        ctx.gate_dtype = None if gate is None else gate.dtype
        return x_c.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        dx = ctx.call.part_grad(ctx.shape, ctx.number) if ctx.needs_input_grad[0] else None
        if ctx.number == 0:
            ctx.call.hand_over()
        return dx, token.new_empty(0, dtype=ctx.gate_dtype) if ctx.needs_input_grad[1] else None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_NK: Tensor, call: RowParts, *tokens: Tensor) -> Tensor:
        x = call.whole()
        ctx.save_for_backward(x, w_NK)  # the weight only so that a change of it before the backward is noticed
        ctx.call = call
        return x @ w_NK.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = ctx.saved_tensors
        ctx.call.start_backward(x.view(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).contiguous())
        return None, None, *(dy.new_empty(0) if wanted else None for wanted in ctx.needs_input_grad[2:])


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_NK: Tensor, gate: Tensor | None, call: ColumnParts, number: int) -> Tensor:
        ctx.save_for_backward(x, w_NK)  # the weight only so that a change of it before the backward is noticed
        ctx.call, ctx.number = call, number
        ctx.gate_dtype = None if gate is None else gate.dtype
        return call.product(x, number)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = ctx.saved_tensors
        dx = ctx.call.collect(x, dy, ctx.number, ctx.needs_input_grad[0])
        return dx, None, dy.new_empty(0, dtype=ctx.gate_dtype) if ctx.needs_input_grad[2] else None, None, None

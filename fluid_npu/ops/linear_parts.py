"""A linear layer in parts of its heads, so that each part's exchange may fly while the next is computed.

    columns   y_c = x W[part c]^T          one autograd node a part; the last one's backward computes dX of all parts
    rows      y = sum over c of x_c W[:, part c]^T, in the order of the parts, added up in fp32 or wider

A part is a list of heads: blocks of ``size`` rows (columns) of the weight, anywhere in it. dW is computed once, of all
parts, as without parts. R rows of the input (all dimensions but the last), K inputs, N outputs, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of

TakeDW = Callable[[Tensor, Tensor], Any]
"""Takes (x_RK, dy_RN) once in a backward, and computes or keeps dW."""


class ColumnParts:
    """One forward of a layer whose outputs are computed part by part.

    Args:
        w_NK: the weight, detached.
        parts: heads of each part; together every head once. int64 on the device of the weight.
        size: D.
        take_dw: see ``TakeDW``; None for a frozen weight.
        gate: an empty tensor that gets a gradient once all parts' backwards are done, or None.
    """

    def __init__(
        self, w_NK: Tensor, parts: Sequence[Tensor], size: int, take_dw: TakeDW | None, gate: Tensor | None
    ) -> None:
        self.w_NK, self.parts, self.size = w_NK, list(parts), size
        self.take_dw, self.gate = take_dw, gate
        self._dy: Tensor | None = None
        self._missing = len(self.parts)

    def compute(self, x: Tensor, number: int) -> Tensor:
        """``[..., n * D]``: the outputs of part ``number`` for ``[..., K]``; its heads in the order of the part."""
        y: Tensor = _Columns.apply(x, self.w_NK, self.gate, self, number)
        return y

    def product(self, x: Tensor, number: int) -> Tensor:
        """As ``compute``, without a graph."""
        w_NK = self.w_NK.view(-1, self.size, self.w_NK.shape[1]).index_select(0, self.parts[number])
        return x.matmul(w_NK.flatten(0, 1).t())

    def collect(self, x: Tensor, dy: Tensor, number: int, wants_dx: bool) -> Tensor | None:
        """Takes the gradient of one part; with the last one dX of all parts, and dW is handed over."""
        if self._dy is None:
            self._dy = dy.new_empty(*dy.shape[:-1], self.w_NK.shape[0] // self.size, self.size)
        self._dy.index_copy_(-2, self.parts[number], dy.unflatten(-1, (-1, self.size)))
        self._missing -= 1
        if self._missing:
            return None
        dy_RN, self._dy, self._missing = self._dy.view(-1, self.w_NK.shape[0]), None, len(self.parts)
        dx = (dy_RN @ self.w_NK).view(x.shape) if wants_dx else None
        if self.take_dw is not None:
            self.take_dw(x.reshape(-1, x.shape[-1]), dy_RN)
        return dx


class RowParts:
    """One forward of a layer whose inputs come part by part. Arguments as ``ColumnParts``; parts of the inputs.

    ``add`` is called once for each part, in order; the last call gives the sum.
    """

    def __init__(
        self, w_NK: Tensor, parts: Sequence[Tensor], size: int, take_dw: TakeDW | None, gate: Tensor | None
    ) -> None:
        self.w_NK, self.parts, self.size = w_NK, list(parts), size
        self.take_dw, self.gate = take_dw, gate
        self._token: Tensor | None = None
        self._sum_RN: Tensor | None = None
        self._dy_RN: Tensor | None = None
        self._x: Tensor | None = None

    def add(self, x_c: Tensor, number: int) -> Tensor:
        """Adds the products of ``[..., n * D]``; ``[..., N]`` from the last part, an empty tensor from the others."""
        out: Tensor = _Rows.apply(x_c, self._token, self.w_NK, self.gate, self, number)
        # The graph holds this object: with its own output in it neither would ever be freed.
        self._token = None if self.last(number) else out
        return out

    def weight_of(self, number: int) -> Tensor:
        """``[N, n * D]``: the columns of one part."""
        heads = self.w_NK.view(self.w_NK.shape[0], -1, self.size)
        return heads.index_select(1, self.parts[number]).flatten(1)

    def last(self, number: int) -> bool:
        """Whether the sum is whole after this part."""
        return number == len(self.parts) - 1

    def accumulate(self, x_c: Tensor, number: int) -> Tensor:
        """Adds one product to the sum, which is given and forgotten with the last."""
        x_RK = x_c.reshape(-1, x_c.shape[-1])
        if self._sum_RN is None:
            wide = torch.float32 if x_c.dtype in (torch.bfloat16, torch.float16) else x_c.dtype
            self._sum_RN = x_c.new_zeros(x_RK.shape[0], self.w_NK.shape[0], dtype=wide)
        kernels_of(x_c).dense_dw_add_(self._sum_RN, self.weight_of(number).t(), x_RK.t())
        if not self.last(number):
            return x_c.new_empty(0)
        whole, self._sum_RN = self._sum_RN, None
        return whole.to(x_c.dtype).view(*x_c.shape[:-1], -1)

    def start_backward(self, dy: Tensor) -> None:
        """The gradient of the sum, which the last part's node gets first."""
        self._dy_RN = dy.reshape(-1, dy.shape[-1]).contiguous()

    def collect(self, x_c: Tensor, number: int) -> Tensor:
        """dX of one part; with the first, which comes last, dW is handed over."""
        assert self._dy_RN is not None, "the last part's backward comes first"
        dx = (self._dy_RN @ self.weight_of(number)).view(x_c.shape)
        if self.take_dw is not None:
            if self._x is None:
                self._x = x_c.new_empty(self._dy_RN.shape[0], self.w_NK.shape[1] // self.size, self.size)
            self._x.index_copy_(1, self.parts[number], x_c.reshape(self._x.shape[0], -1, self.size))
        if number == 0:
            dy_RN, x, self._dy_RN, self._x = self._dy_RN, self._x, None, None
            if self.take_dw is not None and x is not None:
                self.take_dw(x.flatten(1), dy_RN)
        return dx


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_NK: Tensor, gate: Tensor | None, call: ColumnParts, number: int) -> Tensor:
        ctx.save_for_backward(x, w_NK)  # the weight only so that a change of it before the backward is noticed
        ctx.call, ctx.number = call, number
        return call.product(x, number)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = ctx.saved_tensors
        dx = ctx.call.collect(x, dy, ctx.number, ctx.needs_input_grad[0])
        return dx, None, dy.new_empty(0) if ctx.needs_input_grad[2] else None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_c: Tensor, _token: Tensor | None, w_NK: Tensor, gate: Tensor | None, call: RowParts, number: int
    ) -> Tensor:
        ctx.save_for_backward(x_c, w_NK)
        ctx.call, ctx.number = call, number
        return call.accumulate(x_c, number)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_c, _ = ctx.saved_tensors
        if ctx.call.last(ctx.number):
            ctx.call.start_backward(dy)
        dx = ctx.call.collect(x_c, ctx.number)
        empty = dy.new_empty(0)
        return dx, empty if ctx.number else None, None, empty if ctx.needs_input_grad[3] else None, None, None

"""A linear layer whose dX comes at once, whose dW goes where it is told, and whose dX may be reduced over ranks.

    backward:  gather x (sequence parallelism) || dX = dy W
               reduce dX over the ranks        || dW = dy^T x, or whatever ``take_dw`` does with it

K inputs, N outputs, R rows (all dimensions but the last).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

TakeDenseDW = Callable[[Tensor, Tensor], Tensor | None]


class Landing(Protocol):
    """A collective under way."""

    def land(self) -> Tensor:
        """Its result, once it is there."""


class Region(Protocol):
    """The ranks over which a layer's input and its gradient are exchanged (``comm.tensor_parallel``)."""

    @property
    def gathers(self) -> bool:
        """Whether the input is gathered from the ranks."""

    def gather(self, x: Tensor) -> Landing:
        """Starts gathering the input."""

    def reduce(self, dx: Tensor) -> Landing:
        """Starts reducing the input's gradient; may write into it."""


@dataclass(frozen=True, kw_only=True)
class LinearBackward:
    """What one call's backward needs besides tensors.

    ``take_dw(x_RK, dy_RN)`` computes or keeps dW: it returns the weight's gradient for autograd, or None when the
    weight was handed over as a constant. ``region`` None: nothing is exchanged.
    """

    take_dw: TakeDenseDW
    region: Region | None = None


def parallel_linear(
    x: Tensor, w_NK: Tensor, bias: Tensor | None, backward: LinearBackward, gate: Tensor | None = None
) -> Tensor:
    """x w^T + bias, ``[..., N]``.

    Args:
        x: ``[..., K]``; with a gathering region this rank's part along the first dimension.
        w_NK: the weight; a detached one if ``backward.take_dw`` keeps its gradient.
        bias: ``[N]`` or None; its gradient is returned by autograd.
        backward: see ``LinearBackward``.
        gate: an empty tensor that gets a gradient when this call's backward has handed its dW over.
    """
    y: Tensor = _ParallelLinear.apply(x, w_NK, bias, gate, backward)
    return y


class _ParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_NK: Tensor, bias: Tensor | None, gate: Tensor | None, backward: LinearBackward
    ) -> Tensor:
        ctx.save_for_backward(x, w_NK)
        ctx.spec = backward
        y = torch.matmul(_whole(x, backward.region), w_NK.t())
        return y if bias is None else y + bias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_NK = ctx.saved_tensors
        region = ctx.spec.region
        gathering = region.gather(x) if region is not None and region.gathers else None
        dx = dy.matmul(w_NK) if ctx.needs_input_grad[0] else None
        if gathering is not None:
            x = gathering.land()
        reducing = region.reduce(dx) if region is not None and dx is not None else None
        # contiguous: a strided dy would be copied by each of the two products that follow.
        dy_RN = dy.contiguous().view(-1, dy.shape[-1])
        dw = ctx.spec.take_dw(x.reshape(-1, x.shape[-1]), dy_RN)
        dbias = dy_RN.sum(dim=0) if ctx.needs_input_grad[2] else None
        dgate = dy.new_empty(0) if ctx.needs_input_grad[3] else None
        return dx if reducing is None else reducing.land(), dw, dbias, dgate, None


def _whole(x: Tensor, region: Region | None) -> Tensor:
    return x if region is None or not region.gathers else region.gather(x).land()

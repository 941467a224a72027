"""A linear layer whose dW can be handed over instead of computed, and dense dW straight into main_grad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_npu.device import kernels_of

DeferDenseDW = Callable[[Tensor, Tensor], Any]


def dense_linear(
    x: Tensor,
    w_NK: Tensor,
    bias: Tensor | None = None,
    *,
    defer_dw: DeferDenseDW | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x w^T + bias, [..., N].

    Args:
        x: [..., K].
        w_NK: weight in the layout of nn.Linear.
        bias: [N] or None; its gradient is always returned by autograd.
        defer_dw: the weight becomes a constant for autograd; the backward returns dX and the bias gradient and
            calls ``defer_dw(x_RK, dy_RN)``, x in its own dtype and dy in ``out_dtype``.
        out_dtype: compute and return in this dtype (a router in fp32 or fp64); gradients of x and w keep theirs.
    """
    if defer_dw is None:
        if out_dtype is not None:
            x, w_NK = x.to(out_dtype), w_NK.to(out_dtype)
            bias = None if bias is None else bias.to(out_dtype)
        return F.linear(x, w_NK, bias)
    # A graph is needed although the weight is constant: an input that needs no gradient still owes dW.
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return _DeferredLinear.apply(x, w_NK.detach(), bias, defer_dw, out_dtype or x.dtype)


def add_dense_dw_(main_grad_NK: Tensor, x_RK: Tensor, dy_RN: Tensor) -> None:
    """Adds dy^T x to ``main_grad_NK`` in place (fp32, or the dtype of x and dy)."""
    kernels_of(x_RK).dense_dw_add_(main_grad_NK, x_RK, dy_RN)


def dense_weight_grad(weight_NK: Any, x_RK: Tensor, dy_RN: Tensor, fuse: bool) -> Tensor | None:
    """dW of a parameter, or None after it was added to the parameter's ``main_grad``, if it has one and ``fuse``."""
    if fuse and getattr(weight_NK, "main_grad", None) is not None:
        add_dense_dw_(weight_NK.main_grad, x_RK, dy_RN)
        weight_NK.grad_added_to_main_grad = True
        return None
    return dy_RN.t() @ x_RK


class DenseGradInParts:
    """dW of a parameter computed in parts along its outputs, at different times; delivered when the last part is there.

    Args:
        weight_NK: the parameter.
        sizes: outputs of each part, in order; their sum is N.
        fuse: add to the parameter's ``main_grad``, if it has one.
        deliver: called once with what ``dense_weight_grad`` would return.
    """

    def __init__(
        self, weight_NK: Any, sizes: Sequence[int], fuse: bool, deliver: Callable[[Tensor | None], None]
    ) -> None:
        self._weight, self._sizes, self._deliver = weight_NK, list(sizes), deliver
        self._fused = fuse and getattr(weight_NK, "main_grad", None) is not None
        self._missing = len(self._sizes)
        self._grad: Tensor | None = None

    def add(self, number: int, x_RK: Tensor, dy_Rn: Tensor) -> None:
        """Computes one part; ``dy_Rn`` are its columns of dy."""
        weight = self._weight
        with torch.no_grad():
            if self._fused:
                add_dense_dw_(weight.main_grad.split(self._sizes)[number], x_RK, dy_Rn)
                weight.grad_added_to_main_grad = True
            else:
                if self._grad is None:
                    self._grad = x_RK.new_empty(weight.shape)
                torch.mm(dy_Rn.t(), x_RK, out=self._grad.split(self._sizes)[number])
        self._missing -= 1
        if not self._missing:
            grad, self._grad = self._grad, None
            self._deliver(grad)


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_NK: Tensor,
        bias: Tensor | None,
        defer_dw: DeferDenseDW,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, w_NK)
        ctx.defer_dw, ctx.bias_dtype = defer_dw, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(out_dtype)
        return F.linear(x.to(out_dtype), w_NK.to(out_dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_NK = ctx.saved_tensors
        dy_RN = dy.reshape(-1, dy.shape[-1]).contiguous()
        dx = (dy_RN @ w_NK.to(dy.dtype)).view(x.shape).to(x.dtype)
        dbias = dy_RN.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        ctx.defer_dw(x.reshape(-1, x.shape[-1]), dy_RN)
        return dx, None, dbias, None, None

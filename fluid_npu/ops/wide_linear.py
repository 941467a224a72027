"""A linear layer that computes above the dtype of its input, as a router in fp32 on bf16 tokens does.

Only the input and the weight are kept for the backward, in their own dtype: no wide copy lives until then.
R rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of


def wide_linear(x: Tensor, w_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """x w^T as [..., N] in ``dtype``, which is wider than that of x [..., K] and w; gradients keep theirs."""
    return _WideLinear.apply(x, w_NK, dtype)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_NK: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, w_NK)
        y_RN = kernels_of(x).wide_mm(x.reshape(-1, x.shape[-1]), w_NK, dtype)
        return y_RN.view(*x.shape[:-1], w_NK.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_NK = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx, dw = kernels_of(x).wide_mm_backward(*rows, w_NK, ctx.needs_input_grad[:2])
        return dx if dx is None else dx.view(x.shape), dw, None

"""FC2 of an expert whose input, the activation, is computed again in the backward instead of being kept.

Shapes: R rows, F ffn, H hidden, L groups. Only the input of the activation and the probabilities stay in memory, as
with Megatron's ``recompute_modules=["moe_act"]`` (whose own helper fails without Transformer Engine in 0.16.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.ops.grouped_matmul import DeferDW, grouped_weight_grad

Activation = Callable[[Tensor, Tensor], Tensor]


def activated_linear(
    h_R2F: Tensor,
    p_R: Tensor,
    w_LFH: Tensor,
    counts_L: Sequence[int],
    activation: Activation,
    *,
    defer_dw: DeferDW | None = None,
    fuse_into: Tensor | None = None,
) -> Tensor:
    """``[R, H]``: ``activation(h, p)`` times each group's weight, the activation not kept.

    ``defer_dw`` and ``fuse_into`` as in ``grouped_linear``; the deferred call receives the recomputed activation.
    """
    weight = w_LFH if defer_dw is None else w_LFH.detach()
    return _ActivatedLinear.apply(h_R2F, p_R, weight, counts_L, activation, defer_dw, fuse_into)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        p: Tensor,
        w: Tensor,
        counts: Sequence[int],
        activation: Activation,
        defer_dw: DeferDW | None,
        fuse_into: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(h, p, w)
        ctx.counts, ctx.activation, ctx.defer_dw, ctx.fuse_into = counts, activation, defer_dw, fuse_into
        return kernels_of(h).grouped_mm(activation(h, p), w, counts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, p, w = ctx.saved_tensors
        dy = dy.contiguous()
        inputs = [h.detach().requires_grad_(), p.detach().requires_grad_()]
        with torch.enable_grad():
            a = ctx.activation(*inputs)
        da = kernels_of(a).grouped_mm(dy, w, ctx.counts, trans_w=True)
        dh, dp = torch.autograd.grad(a, inputs, da)
        dw = None
        if ctx.defer_dw is not None:
            ctx.defer_dw(a.detach(), dy, ctx.counts)
        elif ctx.needs_input_grad[2]:
            dw = grouped_weight_grad(w, a.detach(), dy, ctx.counts, ctx.fuse_into)
        return dh, dp, dw, None, None, None, None

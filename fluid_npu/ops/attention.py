"""Attention through the device's fused operator, with gradients.

Shapes: S queries, T keys, B batch, N query heads, M key heads, D head size of queries and keys, V of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import Choice, kernels_of
from fluid_npu.device.kernels.fused import AttentionCall, AttentionKernels, DifferentiableAttention


def fuses_attention(q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Choice[bool]:
    """Whether ``fused_attention`` can compute this on the device of q, and why."""
    attention = kernels_of(q_SBND).attention
    if attention is None:
        return Choice(False, "the device has no fused attention")
    return attention.accepts(q_SBND, k_TBMD, v_TBMV, call)


def fused_attention(q_SBND: Tensor, k_TBMD: Tensor, v_TBMV: Tensor, call: AttentionCall) -> Tensor:
    """``[S, B, N * V]``: softmax(scale * q k^T) v of each head, without the keys that ``call`` hides.

    A query from which every key is hidden has no defined result. Raises ValueError where ``fuses_attention`` says no.
    """
    chosen = fuses_attention(q_SBND, k_TBMD, v_TBMV, call)
    if not chosen.value:
        raise ValueError(f"fused_attention: {chosen.reason}; use Megatron's DotProductAttention")
    attention = kernels_of(q_SBND).attention
    if isinstance(attention, DifferentiableAttention):
        return attention.compute(q_SBND, k_TBMD, v_TBMV, call)
    return _FusedAttention.apply(q_SBND, k_TBMD, v_TBMV, call)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        attention = kernels_of(q).attention
        assert isinstance(attention, AttentionKernels)
        out, kept = attention.forward(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, *(x for x in kept if isinstance(x, Tensor)))
        ctx.call, ctx.numbers = call, [x for x in kept if not isinstance(x, Tensor)]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_SBO: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        attention = kernels_of(q).attention
        assert isinstance(attention, AttentionKernels)
        return *attention.backward(dy_SBO, q, k, v, out, (*kept, *ctx.numbers), ctx.call), None

"""Rotary position embedding through the device's fused operator, with the gradient of its input.

Shapes: S positions, B batch, N heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import Choice, kernels_of


def fuses_rotary(x_SBND: Tensor, cos: Tensor, interleaved: bool = False) -> Choice[bool]:
    """Whether ``fused_rotary`` can compute this on the device of x, and why."""
    rotary = kernels_of(x_SBND).rotary
    if rotary is None:
        return Choice(False, "the device has no fused rotary embedding")
    return rotary.accepts(x_SBND, cos, interleaved)


def fused_rotary(x_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x * cos + rotate(x) * sin; rotate takes halves (a, b), or neighbours if ``interleaved``, to (-b, a).

    Args:
        x_SBND: fp16, bf16 or fp32.
        cos, sin: in the dtype of x, broadcast to it; they get no gradient.
        interleaved: see above.

    Raises ValueError where ``fuses_rotary`` says no.
    """
    chosen = fuses_rotary(x_SBND, cos, interleaved)
    if not chosen.value:
        raise ValueError(f"fused_rotary: {chosen.reason}; use Megatron's apply_rotary_pos_emb")
    return _FusedRotary.apply(x_SBND, cos, sin, interleaved)


class _FusedRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        rotary = kernels_of(x).rotary
        assert rotary is not None
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotary.forward(x, cos, sin, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        rotary = kernels_of(dy).rotary
        assert rotary is not None
        return rotary.backward(dy, cos, sin, ctx.interleaved), None, None, None

"""The experts of a rank as one autograd node: grouped FC1, activation times probability, grouped FC2.

One node instead of three: on a CPU, and for fine-grained experts anywhere, the host's time per node is what counts.
Shapes: R rows, H hidden, F ffn, L groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device.kernels.activations import ActivationProbs
from fluid_npu.device.kernels.beside import beside_exchange, is_beside
from fluid_npu.device.kernels.groups import Groups
from fluid_npu.device.kernels.known_rows import kernels_for
from fluid_npu.ops.grouped_matmul import DeferDW, grouped_weight_grad


@dataclass(frozen=True, kw_only=True)
class WeightGradTarget:
    """Where the gradient of one weight goes: to a task, into a parameter's ``main_grad``, or back to autograd."""

    defer: DeferDW | None = None
    """Called with (input rows, output gradient rows, counts); the weight is then a constant for autograd."""
    fuse_into: Tensor | None = None
    """The parameter whose ``main_grad`` takes it, as ``gemm_fusion``."""


@dataclass(frozen=True, kw_only=True)
class ExpertMLP:
    """What ``expert_mlp`` needs besides tensors."""

    counts: Groups
    """[L] rows of each group."""
    activation: ActivationProbs | None
    """None for SwiGLU times p, which also CPU and NPU have kernels of their own for."""
    recompute: bool = False
    """Computes the activation again in the backward instead of keeping it (Megatron's ``moe_act``)."""
    fc1: WeightGradTarget = WeightGradTarget()
    fc2: WeightGradTarget = WeightGradTarget()
    beside: bool = field(default_factory=is_beside)
    """Whether forward and backward run beside an AllToAll."""


def expert_mlp(x_RH: Tensor, p_R: Tensor, w1_LHF: Tensor, w2_LFH: Tensor, mlp: ExpertMLP) -> Tensor:
    """``[R, H]``: FC2(activation(FC1(x)) * p) with each group's weights.

    Args:
        x_RH: rows sorted by group, possibly with a stride.
        p_R: probability of each row.
        w1_LHF: ``[L, H, 2F]`` when gated, else ``[L, H, F]``.
        w2_LFH: ``[L, F, H]``.
        mlp: counts, activation, and where the weight gradients go.

    The backward computes, in this order: dX of FC2, dW of FC2 (or its hand-over), the activation's gradients, dX
    of FC1, dW of FC1 (or its hand-over).
    """
    if torch.is_grad_enabled() and mlp.fc1.defer is not None and not x_RH.requires_grad:
        # A graph is needed although the weights are constants: rows that need no gradient still owe dW.
        x_RH = x_RH.detach().requires_grad_()
    w1 = w1_LHF.detach() if mlp.fc1.defer is not None else w1_LHF
    w2 = w2_LFH.detach() if mlp.fc2.defer is not None else w2_LFH
    return _ExpertMLP.apply(x_RH, p_R, w1, w2, mlp)


def _activate(mlp: ExpertMLP, h: Tensor, p: Tensor) -> Tensor:
    kernels = kernels_for(h, mlp.counts)
    if mlp.activation is None:
        return kernels.swiglu_probs(h, p, mlp.counts)
    return kernels.activation_probs(h, p, mlp.activation, mlp.counts)


def _activation_grads(mlp: ExpertMLP, da: Tensor, h: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    kernels = kernels_for(h, mlp.counts)
    if mlp.activation is None:
        return kernels.swiglu_probs_grad(da, h, p, mlp.counts)
    return kernels.activation_probs_grad(da, h, p, mlp.activation, mlp.counts)


def _weight_grad(
    target: WeightGradTarget, needed: bool, w: Tensor, rows: Tensor, dy: Tensor, counts: Groups
) -> Tensor | None:
    if target.defer is not None:
        target.defer(rows, dy, counts)
        return None
    return grouped_weight_grad(w, rows, dy, counts, target.fuse_into) if needed else None


def mlp_forward(x: Tensor, p: Tensor, w1: Tensor, w2: Tensor, mlp: ExpertMLP) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``[R, H]`` and what ``mlp_backward`` needs of the forward, without autograd. Arguments as ``expert_mlp``."""
    h, a = mlp_up(x, p, w1, mlp)
    return mlp_down(a, w2, mlp), kept_of(x, p, w1, w2, h, a, mlp)


def mlp_up(x: Tensor, p: Tensor, w1: Tensor, mlp: ExpertMLP) -> tuple[Tensor, Tensor]:
    """FC1 ``[R, 2F]`` and the activation times p ``[R, F]``; ``mlp_down`` may follow later."""
    h = kernels_for(x, mlp.counts).grouped_mm(x, w1, mlp.counts)
    return h, _activate(mlp, h, p)


def mlp_down(a: Tensor, w2: Tensor, mlp: ExpertMLP) -> Tensor:
    """FC2, ``[R, H]``."""
    return kernels_for(a, mlp.counts).grouped_mm(a, w2, mlp.counts)


def kept_of(x: Tensor, p: Tensor, w1: Tensor, w2: Tensor, h: Tensor, a: Tensor, mlp: ExpertMLP) -> tuple[Tensor, ...]:
    """What ``mlp_backward`` needs."""
    return (x, p, w1, w2, h, *(() if mlp.recompute else (a,)))


def mlp_backward(
    dy: Tensor, kept: Sequence[Tensor], mlp: ExpertMLP, needs_dw: tuple[bool, bool] = (False, False)
) -> tuple[Tensor | None, ...]:
    """Gradients of x, p, FC1's and FC2's weight in that order; ``needs_dw``: whether autograd wants the last two."""
    x, p, w1, w2, h, *activated = kept
    kernels, counts = kernels_for(x, mlp.counts), mlp.counts
    dy = dy.contiguous()
    da = kernels.grouped_mm(dy, w2, counts, trans_w=True)
    a = activated[0] if activated else _activate(mlp, h, p)
    dw2 = _weight_grad(mlp.fc2, needs_dw[1], w2, a, dy, counts)
    dh, dp = _activation_grads(mlp, da, h, p)
    del da, a, activated, h, kept
    dx = kernels.grouped_mm(dh, w1, counts, trans_w=True)
    dw1 = _weight_grad(mlp.fc1, needs_dw[0], w1, x, dh, counts)
    return dx, dp, dw1, dw2


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, w1: Tensor, w2: Tensor, mlp: ExpertMLP) -> Tensor:
        y, kept = mlp_forward(x, p, w1, w2, mlp)
        ctx.mlp = mlp
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_dw = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        with beside_exchange(ctx.mlp.beside):
            return (*mlp_backward(dy, ctx.saved_tensors, ctx.mlp, needs_dw), None)

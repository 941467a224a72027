"""The activation of an expert, times the routing probability of each row.

Shapes: R rows, F ffn. Only the input and the probabilities are kept for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.activations import ActivationProbs


def swiglu_probs(h_R2F: Tensor, p_R: Tensor) -> Tensor:
    """[R, F] in the dtype of h: silu(h[:, :F]) * h[:, F:] * p, rounded as Megatron-Core does.

    ``p_R`` may be wider than h (fp32 probabilities): the product is formed in its dtype and rounded once.
    Raises ValueError for an odd width or a p that is not [R].
    """
    _check_halves("swiglu_probs", h_R2F)
    _check_probs("swiglu_probs", h_R2F, p_R)
    return _SwigluProbs.apply(h_R2F, p_R)


def activation_probs(h: Tensor, p_R: Tensor, activation: Callable[[Tensor], Tensor], gated: bool = False) -> Tensor:
    """[R, F] in the dtype of h: (activation(h) * p); ``gated`` halves h as swiglu_probs does, and raises as it does."""
    if gated:
        _check_halves("activation_probs", h)
    _check_probs("activation_probs", h, p_R)
    return _ActivationProbs.apply(h, p_R, ActivationProbs(function=activation, gated=gated))


def _check_halves(op: str, h: Tensor) -> None:
    if h.shape[-1] % 2:
        raise ValueError(f"{op}: h has width {h.shape[-1]}; it must be even: gate and value halves")


def _check_probs(op: str, h: Tensor, p_R: Tensor) -> None:
    if p_R.dim() != 1 or p_R.shape[0] != h.shape[0]:
        raise ValueError(f"{op}: p has shape {tuple(p_R.shape)}; it must be [{h.shape[0]}], one for each row of h")


class _SwigluProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_R2F: Tensor, p_R: Tensor) -> Tensor:
        ctx.save_for_backward(h_R2F, p_R)
        return kernels_of(h_R2F).swiglu_probs(h_R2F, p_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, da_RF: Tensor) -> tuple[Tensor, Tensor]:
        h_R2F, p_R = ctx.saved_tensors
        return kernels_of(h_R2F).swiglu_probs_grad(da_RF, h_R2F, p_R)


class _ActivationProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, p_R: Tensor, activation: ActivationProbs) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(h, p_R)
        return kernels_of(h).activation_probs(h, p_R, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, da_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        h, p_R = ctx.saved_tensors
        return (*kernels_of(h).activation_probs_grad(da_RF, h, p_R, ctx.activation), None)

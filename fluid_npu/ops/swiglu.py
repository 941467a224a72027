"""The activation of an expert, times the routing probability of each row.

Shapes: R rows, F ffn. Only the input and the probabilities are kept for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of


def swiglu_probs(h_R2F: Tensor, p_R: Tensor) -> Tensor:
    """[R, F] in the dtype of h: silu(h[:, :F]) * h[:, F:] * p, rounded as Megatron-Core does.

    ``p_R`` may be wider than h (fp32 probabilities): the product is formed in its dtype and rounded once.
    Raises ValueError for an odd width or a p that is not [R].
    """
    if h_R2F.shape[-1] % 2:
        raise ValueError(f"swiglu_probs: h has width {h_R2F.shape[-1]}; it must be even: gate and value halves")
    _check_probs("swiglu_probs", h_R2F, p_R)
    return _SwigluProbs.apply(h_R2F, p_R)


def activation_probs(h: Tensor, p_R: Tensor, activation: Callable[[Tensor], Tensor], gated: bool = False) -> Tensor:
    """(activation(h) * p) in the dtype of h, by autograd; ``gated`` halves h as swiglu_probs does."""
    _check_probs("activation_probs", h, p_R)
    return (_activated(h, activation, gated) * p_R.unsqueeze(-1)).to(h.dtype)


@dataclass(frozen=True, kw_only=True)
class ActivationProbs:
    """``activation_probs`` of a function, and its gradients without the products of its forward."""

    function: Callable[[Tensor], Tensor]
    gated: bool = False

    def __call__(self, h: Tensor, p_R: Tensor) -> Tensor:
        return activation_probs(h, p_R, self.function, self.gated)

    def grads(self, da: Tensor, h: Tensor, p_R: Tensor) -> tuple[Tensor, Tensor]:
        """Of h and p: the bits that autograd gives, without computing a again."""
        h = h.detach().requires_grad_()
        with torch.enable_grad():
            plain = _activated(h, self.function, self.gated)
        da = da.to(torch.promote_types(plain.dtype, p_R.dtype))
        (dh,) = torch.autograd.grad(plain, h, (da * p_R.unsqueeze(-1)).to(plain.dtype))
        return dh, (da * plain.detach()).sum(-1).to(p_R.dtype)


def _activated(h: Tensor, activation: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
    if not gated:
        return activation(h)
    h0, h1 = h.chunk(2, dim=-1)
    return activation(h0) * h1


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

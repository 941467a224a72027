"""RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * gamma."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluid_npu.device import kernels_of


def rms_norm(x: Tensor, gamma: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalised x in the dtype of x, computed in fp32 or better.

    Args:
        x: [..., H].
        gamma: [H], in the dtype of x or fp32.
        eps: added to the mean square, inside the root.

    Raises:
        ValueError: gamma is not [H].
    """
    if gamma.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: gamma has shape {tuple(gamma.shape)}; it must be [{x.shape[-1]}] as x's rows")
    return _RMSNorm.apply(x, gamma, eps)


def module_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """``rms_norm`` where the device has an operator for it that takes x and gamma, else ``F.rms_norm``, bit for bit.

    On a CPU and on CUDA that is always torch's own norm.
    """
    kernels = kernels_of(x)
    if kernels.fuses_norm(x, gamma).value:
        return rms_norm(x, gamma, eps)
    return F.rms_norm(x, gamma.shape, gamma, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        y, rstd = kernels_of(x).rms_norm(x, gamma, eps)
        ctx.save_for_backward(x, gamma, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gamma, rstd = ctx.saved_tensors
        dx, dgamma = kernels_of(x).rms_norm_grad(dy, x, gamma, rstd)
        return dx, dgamma, None

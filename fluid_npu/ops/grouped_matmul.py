"""Grouped matmul: the rows of each group times that group's weight.

``npu_gmm`` and ``npu_gmm_v2`` keep the documented contract of Ascend's operator and check what they are given.
The engine's own path, with counts on the host and without checks, is ``expert_mlp``. Shapes: M or R rows, K inner, N
outer, E or L groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device import kernels_of
from fluid_npu.device.kernels.groups import GroupRows, Groups
from fluid_npu.device.kernels.known_rows import kernels_for
from fluid_npu.ops.gmm_contract import GroupList, check_gmm, host_counts

DeferDW = Callable[[Tensor, Tensor, Groups], Any]


def npu_gmm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    group_list: GroupList = None,
    group_type: int = 0,
    gemm_fusion: bool = False,
    original_weight: Tensor | None = None,
) -> Tensor:
    """Grouped matmul; ``group_list`` holds running totals (the end of each group).

    Args:
        x: group_type 0: [M, K]; group_type 2: x^T, a [K, M] view; group_type -1: [M, K].
        weight: group_type 0: [E, K, N], a transposed view too; 2: [M, N]; -1: [K, N] or [1, K, N].
        bias: [E, N] ([N] or [1, N] for -1), fp16 for fp16, fp32 for bf16 and fp32; gets no gradient.
        group_list: list of int, or a 1-D int64 tensor on the device of x; None only for group_type -1.
        group_type: 0 groups rows, 2 groups the inner dimension (dW), -1 has no groups; 1 is not supported.
        gemm_fusion: the backward adds dW to ``original_weight.main_grad`` (fp32), sets
            ``original_weight.grad_added_to_main_grad`` and returns a placeholder gradient: zeros if
            ``original_weight.zero_out_wgrad``, else uninitialised memory that must not be read.
        original_weight: the parameter that ``weight`` is, or is a view of.

    Returns:
        [M, N] for group_type 0 and -1, [E, K, N] for 2, in the dtype of x. Gradients exist for group_type 0.

    Raises:
        TypeError: a wrong kind of argument or dtype. ValueError: values or shapes that do not fit.
        RuntimeError: tensors on different devices, a gradient that cannot be given, a missing main_grad.
    """
    check_gmm("npu_gmm", x, weight, bias, group_list, group_type, gemm_fusion, original_weight)
    host = host_counts("npu_gmm", x, weight, group_list, group_type, cumulative=True)
    # A copy: the caller may write into its list before the backward.
    counts = GroupRows(host, ends=group_list.clone() if isinstance(group_list, Tensor) else None)
    return _gmm(x, weight, bias, counts, group_type, original_weight if gemm_fusion else None)


def npu_gmm_v2(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    group_list: Tensor | None = None,
    group_type: int = 0,
    gemm_fusion: bool = False,
    original_weight: Tensor | None = None,
) -> Tensor:
    """As ``npu_gmm``, but ``group_list`` holds the rows of each group and must be a tensor."""
    check_gmm("npu_gmm_v2", x, weight, bias, group_list, group_type, gemm_fusion, original_weight)
    host = host_counts("npu_gmm_v2", x, weight, group_list, group_type, cumulative=False)
    counts = GroupRows(host, on_device=group_list.clone() if isinstance(group_list, Tensor) else None)
    return _gmm(x, weight, bias, counts, group_type, original_weight if gemm_fusion else None)


def _gmm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: GroupRows,
    group_type: int,
    fused_into: Tensor | None,
) -> Tensor:
    if group_type == 2:
        return kernels_of(x).grouped_dw(x.t(), weight, counts)
    if group_type == -1 and weight.dim() == 2:
        weight = weight.unsqueeze(0)
    y = _GroupedMM.apply(x, weight, counts, fused_into)
    return y if bias is None else _add_bias(y, bias.view(len(counts), -1), counts)


def _add_bias(y_MN: Tensor, bias_EN: Tensor, counts: list[int]) -> Tensor:
    repeats = torch.tensor(counts, device=bias_EN.device)
    rows_MN = bias_EN.repeat_interleave(repeats, dim=0, output_size=y_MN.shape[0])
    return (y_MN + rows_MN).to(y_MN.dtype)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, w_LKN: Tensor, counts_L: Sequence[int], fused_into: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_RK, w_LKN)
        ctx.counts_L, ctx.fused_into = counts_L, fused_into
        return kernels_of(x_RK).grouped_mm(x_RK, w_LKN, counts_L)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        x_RK, w_LKN = ctx.saved_tensors
        dy_RN = dy_RN.contiguous()
        kernels = kernels_of(x_RK)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = kernels.grouped_mm(dy_RN, w_LKN, ctx.counts_L, trans_w=True)
        if ctx.needs_input_grad[1]:
            dw = grouped_weight_grad(w_LKN, x_RK, dy_RN, ctx.counts_L, ctx.fused_into)
        return dx, dw, None, None


def grouped_weight_grad(
    w_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Groups, fuse_into: Tensor | None
) -> Tensor:
    """dW of ``w_LKN``, or with ``fuse_into`` the placeholder after it was added to that parameter's main_grad."""
    if fuse_into is None:
        return kernels_for(x_RK, counts_L).grouped_dw(x_RK, dy_RN, counts_L)
    add_to_main_grad(fuse_into, w_LKN, x_RK, dy_RN, counts_L)
    return placeholder_grad(fuse_into, w_LKN)


def add_to_main_grad(parameter: Any, w_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Groups) -> None:
    """Adds dW to the ``main_grad`` of the parameter behind ``w_LKN`` and sets ``grad_added_to_main_grad``."""
    add_ = kernels_for(x_RK, counts_L).grouped_dw_add_
    groups, inner, outer = w_LKN.shape
    if w_LKN.transpose(1, 2).is_contiguous() and not w_LKN.is_contiguous():
        # A transposed view of the parameter: its main_grad holds dW^T.
        add_(parameter.main_grad.view(groups, outer, inner), dy_RN, x_RK, counts_L)
    else:
        add_(parameter.main_grad.view(groups, inner, outer), x_RK, dy_RN, counts_L)
    parameter.grad_added_to_main_grad = True


def placeholder_grad(parameter: Any, like: Tensor | None = None) -> Tensor:
    """What autograd gets for a weight whose gradient is in ``main_grad`` already: nobody may read it.

    Zeros if ``parameter.zero_out_wgrad``, since a hook then adds it, else uninitialised memory. It has the shape of
    ``like``, or of the parameter.
    """
    make = torch.zeros if getattr(parameter, "zero_out_wgrad", False) else torch.empty
    shape = parameter.shape if like is None else like.shape
    return make(shape, dtype=parameter.dtype, device=parameter.device)

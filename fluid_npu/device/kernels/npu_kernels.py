"""Kernels of an Ascend NPU through torch_npu. Each choice between operators is a function named after its rule.

Rules of the operators that shape this file (CANN 8.1 to 8.5, Atlas A2 and A3):

* ``npu_grouped_matmul``: group_list is an int64 tensor on the device; its length must not be 1; at most 1024
  groups with one 3-D weight; no autograd formula.
* ``npu_grouped_matmul_add_``: fp16 or bf16 operands, fp32 result, no empty tensor, and group_list is always read
  as a running total: on these chips ``group_list_type`` is silently ignored.
* ``npu_swiglu``: contiguous input, even width, not empty.
* ``npu_rms_norm``: 2 to 8 dimensions; gamma in fp32 or in the input's dtype.
* ``npu_moe_token_permute``: every token has the same number of experts, at most 512; its ``sorted_indices`` is
  the row of each (token, choice) pair, which the layout already has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluid_npu.device.base import DeviceUnavailable
from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.base import RowLayout
from fluid_npu.device.kernels.groups import Groups, ends_of
from fluid_npu.device.kernels.npu_attention import NpuAttention, NpuBlocks, NpuRotary
from fluid_npu.device.kernels.torch_kernels import TorchKernels, _loop_grouped_dw, _loop_grouped_mm, sum_widened
from fluid_npu.device.npu import load_torch_npu

_HALVES = (torch.bfloat16, torch.float16)
_ADD = "npu_grouped_matmul_add_"
_MAX_GROUPS = 1024
_MAX_TOPK = 512
_MAX_PAIRS = 16777215


class NpuKernels(TorchKernels):
    """torch_npu's fused operators inside their contracts, plain torch outside them.

    Args:
        torch_npu: the module to call; the installed one by default. Tests pass a recording stand-in.
    """

    def __init__(self, torch_npu: Any = None) -> None:
        self._npu = load_torch_npu() if torch_npu is None else torch_npu
        self.attention = NpuAttention(self._npu)
        self.attention_blocks = NpuBlocks(self.attention)
        self.rotary = NpuRotary(self._npu)

    def grouped_mm(self, x_RK: Tensor, w_LKN: Tensor, counts_L: Sequence[int], trans_w: bool = False) -> Tensor:
        if trans_w:
            w_LKN = w_LKN.transpose(1, 2)  # a view: the operator reads transposed weights in place
        if not groups_fit(x_RK, counts_L):
            return _loop_grouped_mm(x_RK, w_LKN, counts_L)
        return self._grouped_matmul(x_RK, w_LKN, counts_L, group_type=0)

    def grouped_dw(self, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> Tensor:
        if not groups_fit(x_RK, counts_L):
            return _loop_grouped_dw(x_RK, dy_RN, counts_L)
        return self._grouped_matmul(x_RK.t(), dy_RN, counts_L, group_type=2)

    def grouped_dw_add_(self, main_grad_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> None:
        if x_RK.shape[0] == 0:
            return  # nothing to add, and the operator refuses empty tensors
        broken = dw_add_rule_broken(main_grad_LKN, x_RK, dy_RN, counts_L)
        Choice(_ADD if broken is None else "dW, then add_", broken or f"{_ADD} takes it").announce("expert dW")
        if broken is None:
            # Always where the groups end, never counts: this operator would read those as ends.
            ends = ends_of(counts_L, x_RK.device, torch.int64)
            self._npu.npu_grouped_matmul_add_(main_grad_LKN, x_RK, dy_RN, ends)
        else:
            main_grad_LKN.add_(self.grouped_dw(x_RK, dy_RN, counts_L))

    def to_e4m3(self, x_TH: Tensor) -> Tensor:
        raise DeviceUnavailable("--a2a-payload-dtype fp8: this NPU has no e4m3 numbers in torch_npu; use same")

    def permute(self, x_TH: Tensor, layout: RowLayout) -> Tensor:
        experts_TK = layout.experts_TK
        if experts_TK is None or not permute_fits(x_TH, experts_TK):
            return super().permute(x_TH, layout)
        return self._npu.npu_moe_token_permute(x_TH, experts_TK.int())[0]

    def unpermute(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        experts_TK = layout.experts_TK
        if experts_TK is None or not permute_fits(x_NH, experts_TK):
            return _sum_rows_in_order(x_NH, layout)
        rows = layout.row_of_pair.int()
        if layout.pairs_per_token == 1:
            return x_NH.index_select(0, rows)  # without probs the operator cannot tell K from the indices
        ones_TK = x_NH.new_ones(experts_TK.shape)
        return self._npu.npu_moe_token_unpermute(x_NH, rows, probs=ones_TK)

    def sum_rows(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        return sum_widened(self, x_NH, layout)

    def swiglu_probs(self, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None) -> Tensor:
        if h_R2F.numel() == 0:
            return super().swiglu_probs(h_R2F, p_R)
        return self._npu.npu_swiglu(h_R2F.contiguous(), dim=-1).mul_(p_R.unsqueeze(-1))

    def swiglu_probs_grad(
        self, da_RF: Tensor, h_R2F: Tensor, p_R: Tensor, counts_L: Groups | None = None
    ) -> tuple[Tensor, Tensor]:
        if h_R2F.numel() == 0:
            return super().swiglu_probs_grad(da_RF, h_R2F, p_R)
        h_R2F = h_R2F.contiguous()
        plain = self._npu.npu_swiglu(h_R2F, dim=-1)
        dp = (plain.to(p_R.dtype) * da_RF).sum(-1)
        scaled = (da_RF * p_R.unsqueeze(-1)).to(h_R2F.dtype)
        return self._npu.npu_swiglu_backward(scaled, h_R2F, dim=-1), dp.to(p_R.dtype)

    def fuses_norm(self, x: Tensor, gamma: Tensor) -> Choice[bool]:
        if norm_fits(x, gamma):
            return Choice(True, "npu_rms_norm takes it")
        return Choice(False, "npu_rms_norm wants 2 to 8 dimensions, and gamma in fp32 or in the dtype of x")

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not norm_fits(x, gamma):
            return super().rms_norm(x, gamma, eps)
        return self._npu.npu_rms_norm(x, gamma, epsilon=eps)

    def rms_norm_grad(self, dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        if not norm_fits(x, gamma):
            return super().rms_norm_grad(dy, x, gamma, rstd)
        dx, dgamma = self._npu.npu_rms_norm_backward(dy.contiguous(), x, gamma, rstd)
        return dx, dgamma.to(gamma.dtype)

    def _grouped_matmul(self, a: Tensor, b: Tensor, counts_L: Sequence[int], group_type: int) -> Tensor:
        ends = ends_of(counts_L, a.device, torch.int64)
        return self._npu.npu_grouped_matmul(
            [a], [b], group_list=ends, split_item=3, group_type=group_type, group_list_type=0
        )[0]


def groups_fit(x_RK: Tensor, counts_L: Sequence[int]) -> bool:
    """npu_grouped_matmul wants 2 to 1024 groups, rows, and fp16, bf16 or fp32."""
    supported = x_RK.dtype in (*_HALVES, torch.float32)
    return supported and x_RK.numel() > 0 and 1 < len(counts_L) <= _MAX_GROUPS


def dw_add_rule_broken(main_grad: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> str | None:
    """The rule of npu_grouped_matmul_add_ that these operands, which have rows, break, or None."""
    rules = (
        (x_RK.dtype in _HALVES and dy_RN.dtype == x_RK.dtype, f"{_ADD} wants fp16 or bf16"),
        (main_grad.dtype == torch.float32 and main_grad.is_contiguous(), f"{_ADD} wants a contiguous fp32 main_grad"),
        (len(counts_L) > 1, f"{_ADD} wants more than one local expert"),
        (groups_fit(x_RK, counts_L), f"{_ADD} wants at most {_MAX_GROUPS} local experts"),
    )
    return next((rule for kept, rule in rules if not kept), None)


def permute_fits(x: Tensor, experts_TK: Tensor) -> bool:
    """npu_moe_token_permute wants at most 512 experts a token, fewer than 2^24 - 1 pairs, and rows."""
    supported = x.dtype in (*_HALVES, torch.float32)
    return supported and x.numel() > 0 and experts_TK.shape[1] <= _MAX_TOPK and experts_TK.numel() < _MAX_PAIRS


def norm_fits(x: Tensor, gamma: Tensor) -> bool:
    """npu_rms_norm wants 2 to 8 dimensions and gamma in fp32 or in the dtype of x."""
    supported = x.dtype in (*_HALVES, torch.float32)
    return supported and 2 <= x.dim() <= 8 and gamma.dtype in (x.dtype, torch.float32)


def _sum_rows_in_order(x_NH: Tensor, layout: RowLayout) -> Tensor:
    """Each token's rows by a difference-free, atomic-free sum: one pass for every row a token may have."""
    sorted_NH = x_NH.index_select(0, layout.row_of_pair)
    starts_T = layout.bag_offsets
    most = getattr(layout, "most_rows", None)  # a layout need not know it
    if most is not None:
        return _sum_bounded(sorted_NH, starts_T, most)
    ends_T = torch.cat([starts_T[1:], starts_T.new_full((1,), x_NH.shape[0])]) if len(starts_T) else starts_T
    longest = int((ends_T - starts_T).max()) if len(starts_T) else 0
    out_TH = x_NH.new_zeros(layout.num_tokens, x_NH.shape[1])
    for step in range(longest):
        tokens = (starts_T + step < ends_T).nonzero().view(-1)
        out_TH[tokens] += sorted_NH.index_select(0, starts_T.index_select(0, tokens) + step)
    return out_TH


def _sum_bounded(sorted_NH: Tensor, starts_T: Tensor, most: int) -> Tensor:
    """The same where no token has more than ``most`` rows: the host waits for nothing."""
    rows = sorted_NH.shape[0]
    out_TH = sorted_NH.new_zeros(starts_T.shape[0], sorted_NH.shape[1])
    if rows == 0 or out_TH.shape[0] == 0:
        return out_TH
    ends_T = torch.cat([starts_T[1:], starts_T.new_full((1,), rows)])
    for step in range(most):
        place_T = starts_T + step
        part_TH = sorted_NH.index_select(0, place_T.clamp(max=rows - 1))
        out_TH += part_TH.masked_fill((place_T >= ends_T).unsqueeze(1), 0)
    return out_TH

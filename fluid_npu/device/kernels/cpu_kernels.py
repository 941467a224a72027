"""Kernels of the CPU: plain torch, with what was measured to be faster there (one thread, torch 2.13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.base import RowLayout
from fluid_npu.device.kernels.torch_attention import MEGATRON, TORCH, torch_attention
from fluid_npu.device.kernels.torch_attention_blocks import torch_attention_blocks
from fluid_npu.device.kernels.torch_kernels import TorchKernels, sum_widened

_HALVES = (torch.bfloat16, torch.float16)
_SWIGLU_BLOCK = 2**17  # elements; smaller blocks pay more for calls than they save in cache misses


class CpuKernels(TorchKernels):
    """``TorchKernels`` plus the CPU's special cases for half precision."""

    def __init__(self) -> None:
        self._widen = widens_dw()
        self.attention = torch_attention((MEGATRON, TORCH))
        self.attention_blocks = torch_attention_blocks((MEGATRON, TORCH))

    def grouped_dw_add_(self, main_grad_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> None:
        if x_RK.dtype in _HALVES and self._widen.value:
            x_RK, dy_RN = x_RK.float(), dy_RN.float()
        super().grouped_dw_add_(main_grad_LKN, x_RK, dy_RN, counts_L)

    def dense_dw_add_(self, main_grad_NK: Tensor, x_RK: Tensor, dy_RN: Tensor) -> None:
        if x_RK.dtype in _HALVES and self._widen.value:
            x_RK, dy_RN = x_RK.float(), dy_RN.float()
        super().dense_dw_add_(main_grad_NK, x_RK, dy_RN)

    def unpermute(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        if x_NH.dtype in (torch.float32, torch.float64):
            return super().unpermute(x_NH, layout)
        # The CPU's bags round ties of bf16 away from zero; index_add_ walks the rows in order and rounds to even.
        out_TH = x_NH.new_zeros(layout.num_tokens, x_NH.shape[1])
        return out_TH.index_add_(0, layout.token_of_row, x_NH)

    def sum_rows(self, x_NH: Tensor, layout: RowLayout) -> Tensor:
        return sum_widened(self, x_NH, layout)

    def _swiglu_rows_at_once(self, rows: int, width: int) -> int:
        return max(1, _SWIGLU_BLOCK // max(width, 1))


def widens_dw() -> Choice[bool]:
    """Whether dW of half-precision operands is computed in fp32: 3 to 4 times faster without AMX, and exact."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if probe is not None and probe():
        return Choice(False, "this CPU has AMX, which multiplies bf16 faster than fp32")
    return Choice(True, "this CPU has no AMX: fp32 products are faster than bf16 ones and go straight into main_grad")

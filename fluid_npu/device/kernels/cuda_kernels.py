"""Kernels of an NVIDIA GPU: torch's grouped matmul, and dW of bf16 or fp16 added to fp32 inside the matmul."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluid_npu.device.choice import Choice
from fluid_npu.device.kernels.torch_kernels import TorchKernels, _groups

_HALVES = (torch.bfloat16, torch.float16)
_LOOP_FLOOR = 4e9  # multiply-adds a group


class CudaKernels(TorchKernels):
    """``TorchKernels`` with cuBLAS accumulating half-precision products straight into fp32 buffers."""

    def __init__(self) -> None:
        self._fuses_add = fuses_dw_add()

    def grouped_dw_add_(self, main_grad_LKN: Tensor, x_RK: Tensor, dy_RN: Tensor, counts_L: Sequence[int]) -> None:
        fusible = self._fusible(main_grad_LKN, x_RK, dy_RN)
        if not fusible or not groups_fill_the_gpu(x_RK, dy_RN, len(counts_L)):
            return super().grouped_dw_add_(main_grad_LKN, x_RK, dy_RN, counts_L)
        for grad, x, dy in _groups(main_grad_LKN, x_RK, dy_RN, counts_L):
            torch.addmm(grad, x.t(), dy, out_dtype=torch.float32, out=grad)

    def dense_dw_add_(self, main_grad_NK: Tensor, x_RK: Tensor, dy_RN: Tensor) -> None:
        if not self._fusible(main_grad_NK, x_RK, dy_RN):
            return super().dense_dw_add_(main_grad_NK, x_RK, dy_RN)
        torch.addmm(main_grad_NK, dy_RN.t(), x_RK, out_dtype=torch.float32, out=main_grad_NK)

    def _fusible(self, main_grad: Tensor, x: Tensor, dy: Tensor) -> bool:
        halves = x.dtype in _HALVES and dy.dtype == x.dtype
        return self._fuses_add.value and halves and main_grad.dtype == torch.float32 and x.shape[0] > 0


def fuses_dw_add() -> Choice[bool]:
    """Whether this torch can add a half-precision product to an fp32 matrix in one call."""
    if "dtype_out" in torch.ops.aten.addmm.overloads():
        return Choice(True, "torch.addmm has out_dtype: dW goes into main_grad without a second pass")
    return Choice(False, f"torch {torch.__version__} has no addmm with out_dtype (2.8 has): dW, then add_")


def groups_fill_the_gpu(x_RK: Tensor, dy_RN: Tensor, groups: int) -> bool:
    """Whether a loop of one fused matmul a group beats one grouped matmul and a pass of add_.

    A launch costs the host about 25 us. H100, bf16, microseconds, loop against grouped and add_: 8 groups of
    2048 rows, 2048 x 1536: 232 and 309; 32 groups of 512 rows, 2048 x 768: 790 and 359.
    """
    return x_RK.numel() * dy_RN.shape[1] >= _LOOP_FLOOR * groups

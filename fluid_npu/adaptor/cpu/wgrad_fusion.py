"""Stand-in for Apex's ``fused_weight_gradient_mlp_cuda``: weight gradients straight into ``main_grad``.

On a CPU and on an NPU; the operators are those of plain torch.
"""

from __future__ import annotations

from types import ModuleType

import torch


def _accumulate(x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor) -> None:
    if main_grad.dtype == x.dtype:
        main_grad.addmm_(dy.t(), x)
    else:
        main_grad.add_(dy.t() @ x)


module = ModuleType("fused_weight_gradient_mlp_cuda", "fluid_npu's stand-in for the Apex extension of this name.")
module.wgrad_gemm_accum_fp32 = _accumulate  # type: ignore[attr-defined]
module.wgrad_gemm_accum_fp16 = _accumulate  # type: ignore[attr-defined]

#: ``layers._grad_accum_fusion_available``: Megatron refuses the flag without the extension.
available = True

"""MoE helpers of megatron-core that assume CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def splits_as_numpy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``maybe_move_tensor_to_cpu``: split sizes already on the CPU must become numpy arrays too.

    gloo's ``all_to_all_single`` refuses tensors as split sizes, and upstream converts CUDA tensors only.
    """

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and tensor.device.type == "cpu":
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    return move


#: ``moe_utils.te_general_gemm``: 0.16 names it without Transformer Engine and fails with NameError.
no_te_gemm = None

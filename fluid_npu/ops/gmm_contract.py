"""What ``npu_gmm`` accepts: every check of the documented contract, with errors that name argument and fix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GroupList = list[int] | Tensor | None

_BIAS_DTYPE = {torch.float16: torch.float16, torch.bfloat16: torch.float32, torch.float32: torch.float32}
_WIDTH_LIMIT = 65536
_INT32_LIMIT = 2**31 - 1


def check_gmm(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group_list: GroupList,
    group_type: int,
    gemm_fusion: bool,
    original_weight: Tensor | None,
) -> None:
    """Raises TypeError, ValueError or RuntimeError where the contract of ``npu_gmm`` says."""
    if group_type not in (-1, 0, 2):
        raise ValueError(
            f"{op}: group_type is {group_type!r}; allowed are -1 (no groups), 0 (rows) and 2 (inner dimension); "
            "1 is not supported, transpose the operands and use 0"
        )
    _check_tensors(op, x, weight)
    _check_shapes(op, x, weight, group_type)
    _check_group_list(op, x, group_list, group_type)
    if bias is not None:
        _check_bias(op, x, weight, bias, group_type)
    if group_type != 0 and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError(
            f"{op}: group_type is {group_type} and an operand requires a gradient; gradients exist for "
            "group_type 0 only; detach x and weight, or use group_type 0"
        )
    if gemm_fusion:
        _check_fusion(op, weight, group_type, original_weight)


def host_counts(
    op: str, x: Tensor, weight: Tensor, group_list: GroupList, group_type: int, cumulative: bool
) -> list[int]:
    """Rows of each group as host integers, checked against the operands. Reads a device tensor back."""
    if group_type == -1 or group_list is None:
        return [x.shape[0]]
    given = group_list.tolist() if isinstance(group_list, Tensor) else list(group_list)
    counts = [end - start for start, end in zip([0, *given], given, strict=False)] if cumulative else given
    kind = "running totals: non-negative and non-decreasing" if cumulative else "counts: non-negative"
    if any(count < 0 for count in counts):
        raise ValueError(f"{op}: group_list is {given}; it must hold {kind}")
    rows = x.shape[1] if group_type == 2 else x.shape[0]
    if sum(counts) != rows:
        total = "last entry" if cumulative else "sum"
        raise ValueError(
            f"{op}: the {total} of group_list is {sum(counts)}; it must equal the {rows} grouped rows of x"
        )
    if group_type == 0 and len(counts) != weight.shape[0]:
        raise ValueError(
            f"{op}: group_list has {len(counts)} entries; weight has {weight.shape[0]} groups, give one entry each"
        )
    return counts


def _check_tensors(op: str, x: Any, weight: Any) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} is {type(tensor).__name__}; a torch.Tensor is required")
        if tensor.dtype not in _BIAS_DTYPE:
            raise TypeError(
                f"{op}: {name}.dtype is {tensor.dtype}; allowed are float16, bfloat16 and float32; convert it"
            )
    if x.dtype != weight.dtype:
        raise TypeError(f"{op}: weight.dtype is {weight.dtype} and x.dtype {x.dtype}; convert one to the other")
    if x.device != weight.device:
        raise RuntimeError(f"{op}: weight is on {weight.device} and x on {x.device}; move weight to {x.device}")


def _check_shapes(op: str, x: Tensor, weight: Tensor, group_type: int) -> None:
    allowed = {-1: (2, 3), 0: (3,), 2: (2,)}[group_type]
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it must be 2-D; flatten the leading dimensions")
    if weight.dim() not in allowed or (group_type == -1 and weight.dim() == 3 and weight.shape[0] != 1):
        form = {-1: "[K, N] or [1, K, N]", 0: "[E, K, N]", 2: "[M, N]"}[group_type]
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}; with group_type {group_type} it must be {form}"
        )
    if x.shape[1] != weight.shape[-2]:
        raise ValueError(
            f"{op}: the last dimension of x is {x.shape[1]} and the next to last of weight {weight.shape[-2]}; "
            "they are the inner dimension and must be equal; transpose weight or x"
        )
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.shape[-1] >= _WIDTH_LIMIT:
            raise ValueError(
                f"{op}: the last dimension of {name} is {tensor.shape[-1]}; it must be below {_WIDTH_LIMIT}; "
                "split it into several calls"
            )
        aligned = max(-(-size * tensor.element_size() // 32) * 32 // tensor.element_size() for size in tensor.shape)
        if aligned >= _INT32_LIMIT:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; every size must stay below 2^31 - 1")


def _check_group_list(op: str, x: Tensor, group_list: Any, group_type: int) -> None:
    wanted = "an int64 tensor" if op == "npu_gmm_v2" else "a list of int or an int64 tensor"
    if group_type == -1:
        if group_list is not None:
            raise ValueError(f"{op}: group_list is given with group_type -1 (no groups); leave it None")
        return
    if isinstance(group_list, list) and op != "npu_gmm_v2":
        for entry in group_list:
            if isinstance(entry, bool) or not isinstance(entry, int):
                raise TypeError(f"{op}: group_list holds {entry!r}; every entry must be an int")
    elif not isinstance(group_list, Tensor):
        raise TypeError(f"{op}: group_list is {type(group_list).__name__}; it must be {wanted}")
    elif group_list.dtype != torch.int64:
        raise TypeError(f"{op}: group_list.dtype is {group_list.dtype}; it must be torch.int64; use .long()")
    elif group_list.dim() != 1:
        raise ValueError(f"{op}: group_list has shape {tuple(group_list.shape)}; it must be 1-D; use .view(-1)")
    elif group_list.device != x.device:
        raise RuntimeError(
            f"{op}: group_list is on {group_list.device} and x on {x.device}; move group_list to {x.device}"
        )
    if len(group_list) == 0:
        raise ValueError(f"{op}: group_list is empty; it must have one entry for each group")


def _check_bias(op: str, x: Tensor, weight: Tensor, bias: Any, group_type: int) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias is {type(bias).__name__}; a torch.Tensor or None is required")
    if bias.requires_grad:
        raise ValueError(f"{op}: bias requires a gradient and gets none; detach it, or add the bias outside")
    if group_type == 2:
        raise ValueError(f"{op}: bias is given with group_type 2, which has none; leave it None")
    if bias.dtype != _BIAS_DTYPE[x.dtype]:
        raise TypeError(
            f"{op}: bias.dtype is {bias.dtype}; with {x.dtype} operands it must be {_BIAS_DTYPE[x.dtype]}; convert it"
        )
    if bias.device != x.device:
        raise RuntimeError(f"{op}: bias is on {bias.device} and x on {x.device}; move bias to {x.device}")
    outer = weight.shape[-1]
    allowed = [(weight.shape[0], outer)] if group_type == 0 else [(outer,), (1, outer)]
    if tuple(bias.shape) not in allowed:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; it must be {' or '.join(map(str, allowed))}")


def _check_fusion(op: str, weight: Tensor, group_type: int, original_weight: Any) -> None:
    if group_type != 0:
        raise ValueError(f"{op}: gemm_fusion is True with group_type {group_type}; it works with 0 only")
    if not isinstance(original_weight, Tensor):
        raise TypeError(
            f"{op}: gemm_fusion is True and original_weight is {type(original_weight).__name__}; "
            "pass the parameter that owns main_grad"
        )
    main_grad = getattr(original_weight, "main_grad", None)
    if main_grad is None:
        raise RuntimeError(
            f"{op}: gemm_fusion is True and original_weight has no main_grad; wrap the model in Megatron's "
            "DistributedDataParallel, set original_weight.main_grad yourself, or pass gemm_fusion=False"
        )
    if main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
        raise RuntimeError(
            f"{op}: original_weight.main_grad is {main_grad.dtype}, contiguous {main_grad.is_contiguous()}; "
            "gemm_fusion needs contiguous float32 (Megatron: accumulate_allreduce_grads_in_fp32)"
        )
    if main_grad.numel() != weight.numel():
        raise ValueError(
            f"{op}: original_weight.main_grad has shape {tuple(main_grad.shape)}; it must be viewable as the "
            f"shape of weight, {tuple(weight.shape)}"
        )
    if not (weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()):
        raise ValueError(
            f"{op}: weight has strides {weight.stride()}; with gemm_fusion it must be original_weight itself, or a "
            "contiguous or transposed view of the whole of it"
        )

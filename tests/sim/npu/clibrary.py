"""Calls an operator of the simulator's libopapi.so as CANN's C interface has it, for what Python code cannot reach."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_FLOAT, _ND = 0, 2


def library() -> ctypes.CDLL:
    """The library that torch_npu has loaded."""
    found = ctypes.CDLL("libopapi.so")
    for name in ("aclCreateTensor", "aclCreateIntArray", "aclCreateScalar"):
        getattr(found, name).restype = ctypes.c_void_p
    return found


def handle(x: torch.Tensor) -> ctypes.c_void_p:
    """An aclTensor of a float tensor, wherever its memory is."""
    sizes, strides = (ctypes.c_int64 * x.dim())(*x.shape), (ctypes.c_int64 * x.dim())(*x.stride())
    rank, data = ctypes.c_uint64(x.dim()), ctypes.c_void_p(x.data_ptr())
    made = library().aclCreateTensor(sizes, rank, _FLOAT, strides, ctypes.c_int64(0), _ND, sizes, rank, data)
    return ctypes.c_void_p(made)


def integers(*values: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(library().aclCreateIntArray((ctypes.c_int64 * len(values))(*values), len(values)))


def scalar(value: float) -> ctypes.c_void_p:
    return ctypes.c_void_p(library().aclCreateScalar(ctypes.byref(ctypes.c_float(value)), _FLOAT))


def run(name: str, *arguments: Any) -> int:
    """Plans and launches ``aclnn<name>`` on the default stream; returns the code of the plan, 0 if it was accepted."""
    workspace, executor = ctypes.c_uint64(), ctypes.c_void_p()
    plan = getattr(library(), f"aclnn{name}GetWorkspaceSize")
    code = int(plan(*arguments, ctypes.byref(workspace), ctypes.byref(executor)))
    if code == 0:
        getattr(library(), f"aclnn{name}")(None, ctypes.c_uint64(0), executor, None)
    return code

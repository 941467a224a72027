"""Every operator that passes torch's dispatcher: what it reads and writes, on which stream, and whether the host waits.

Reads and writes follow from the operator's schema: arguments marked as written, results that are fresh. Views touch
nothing. What an operator does inside is not looked at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluid_npu.order.log import Log
from fluid_npu.order.memory import Memory, stream_name, stream_of, tensors_in
from fluid_npu.order.records import HOST

# Collectives are noted by process_groups.py, with their Work.
_SKIPPED_NAMESPACES = ("c10d", "_c10d_functional", "prim")
# They take a tensor for its shape, or change what a tensor object is, not what its memory holds.
_NO_DATA = """
    empty empty_like new_empty empty_strided new_empty_strided _unsafe_view _reshape_alias set_ resize_ detach_
    is_same_size sym_size sym_stride sym_numel sym_storage_offset record_stream is_pinned
"""
_SHAPE_ONLY = "ones_like zeros_like full_like rand_like randn_like randint_like new_zeros new_ones new_full"
_OVERWRITES = "copy_ zero_ fill_ normal_ uniform_ random_ bernoulli_"
# The host waits for the stream: it needs a value, or a size that follows from values.
_HOST_WAITS = "_local_scalar_dense is_nonzero equal nonzero masked_select unique_dim _unique2 unique_consecutive"
_COPIES = "copy_ _to_copy _copy_from"


def _named(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


NO_DATA, SHAPE_ONLY, OVERWRITES = _named(_NO_DATA), _named(_SHAPE_ONLY), _named(_OVERWRITES)
HOST_WAITS, COPIES = _named(_HOST_WAITS), _named(_COPIES)


class OperatorMode(TorchDispatchMode):
    """Notes each operator after it was submitted. Autograd's threads take the mode over from that of backward()."""

    def __init__(self, log: Log, memory: Memory) -> None:
        super().__init__()
        self._log = log
        self._memory = memory
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = time.perf_counter()
        result = func(*args, **kwargs)
        if not self.paused and func.namespace not in _SKIPPED_NAMESPACES:
            self._note(func, args, kwargs, result, began)
        return result

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, began: float) -> None:
        name = func._schema.name
        if name == "aten::record_stream":
            self._memory.tell(args[0], stream_name(args[1]))
        if name in NO_DATA or _is_view(func._schema):
            return
        reads, writes = _reads_and_writes(func._schema, args, kwargs, result)
        device = _device([*writes, *reads])
        if device.type != "cpu":  # a number in a tensor of the host is read when the kernel is launched
            reads = [x for x in reads if x.device.type != "cpu" or x.dim()]
        stream = stream_of(device)
        accesses = {"reads": self._memory.accesses(reads), "writes": self._memory.accesses(writes)}
        if any(accesses.values()):
            self._log.add("op", name=_full_name(func), stream=stream, at=began, **accesses)
        if stream != HOST and _host_waits(name, args, kwargs, [*reads, *writes]):
            self._log.add("sync", stream=stream, at=began)


def _full_name(func: Any) -> str:
    overload = func._schema.overload_name
    return f"{func._schema.name}.{overload}" if overload else func._schema.name


def _is_view(schema: Any) -> bool:
    infos = [item.alias_info for item in schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _reads_and_writes(
    schema: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    reads: list[torch.Tensor] = []
    writes: list[torch.Tensor] = []
    positional = [item for item in schema.arguments if not item.kwarg_only]
    named = {item.name: item for item in schema.arguments}
    given = [(item, value) for item, value in zip(positional, args, strict=False)]
    given += [(named[key], value) for key, value in kwargs.items() if key in named]
    for item, value in given:
        written = item.alias_info is not None and item.alias_info.is_write
        tensors = list(tensors_in(value))
        if written:
            writes += tensors
        read_too = not written or not (item.is_out or schema.name in OVERWRITES)
        if read_too and schema.name not in SHAPE_ONLY:
            reads += tensors
    fresh = result if isinstance(result, (list, tuple)) else [result]
    for info, value in zip((item.alias_info for item in schema.returns), fresh, strict=False):
        if info is None:
            writes += tensors_in(value)
    if len(schema.returns) == 1 and schema.returns[0].alias_info is None:
        writes = list({id(x): x for x in (*writes, *tensors_in(result))}.values())
    return reads, writes


def _device(tensors: Sequence[torch.Tensor]) -> torch.device:
    """Where the kernel runs: the accelerator that any of its tensors is on."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return tensor.device
    return torch.device("cpu")


def _host_waits(name: str, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[torch.Tensor]) -> bool:
    if name in HOST_WAITS:
        return True
    crosses = len({tensor.device.type for tensor in tensors}) > 1
    if name not in COPIES or not crosses:
        return False
    plain = kwargs.get("non_blocking", args[2] if name == "aten::copy_" and len(args) > 2 else False)
    return not plain

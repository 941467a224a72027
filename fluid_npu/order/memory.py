"""Which allocation a tensor's bytes are in, and when its memory is given back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fluid_npu.order.log import Log
from fluid_npu.order.records import HOST, Access

_HERE = ("cpu", "cuda", "npu")


def stream_of(device: torch.device) -> str:
    """The name of the stream on which this thread submits to the device: "host" for a CPU."""
    if device.type == "cpu":
        return HOST
    return stream_name(torch.get_device_module(device).current_stream(device))


def stream_name(stream: Any) -> str:
    """The name of a stream object of torch.cuda or torch.npu."""
    return f"{stream.device.type}:{stream.device.index or 0}/{stream.stream_id}"


class Memory:
    """Storages get a number when they are first seen; a weak reference tells when they go."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._numbers: dict[int, tuple[int | str, weakref.ref[Any]]] = {}
        self._told: dict[int | str, dict[str, None]] = {}
        self._count = 0

    def access(self, tensor: torch.Tensor) -> Access | None:
        """The bytes from the first to the last element; None for what has no memory here, or no elements.

        Elements of a view may lie apart: what is between them counts as accessed.
        """
        if tensor.device.type not in _HERE or tensor.layout != torch.strided or not tensor.numel():
            return None
        width = tensor.element_size()
        start = int(tensor.storage_offset()) * width
        last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return Access(self.number(tensor), start, start + (last + 1) * width)

    def accesses(self, tensors: Iterable[torch.Tensor]) -> tuple[Access, ...]:
        """Those of several tensors, each once."""
        found = [access for tensor in tensors if (access := self.access(tensor)) is not None]
        return tuple(dict.fromkeys(found))

    def number(self, tensor: torch.Tensor) -> int | str:
        """The number of the tensor's storage; noted as allocated when it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._numbers.get(key)
        if known is not None:
            return known[0]
        self._count += 1
        number = self._count
        # torch keeps one Python object for a storage as long as the storage lives, so this ends when the memory does.
        self._numbers[key] = (number, weakref.ref(storage, partial(self._gone, key)))
        owner = stream_of(tensor.device)
        self._log.add("alloc", alloc=number, size=storage.nbytes(), stream=None if owner == HOST else owner)
        return number

    def adopt(self, tensor: torch.Tensor, name: str) -> None:
        """The tensor's storage is memory that other ranks know by this name; it is never given back."""
        storage = tensor.untyped_storage()
        self._numbers[storage._cdata] = (name, weakref.ref(storage))

    def tell(self, tensor: torch.Tensor, stream: str) -> None:
        """``record_stream``: the allocator will wait for that stream before it uses the memory again."""
        self._told.setdefault(self.number(tensor), {})[stream] = None

    def forget(self) -> None:
        """No more entries."""
        self._numbers.clear()

    def _gone(self, key: int, _: Any) -> None:
        number, _reference = self._numbers.pop(key)
        self._log.add("free", alloc=number, streams=tuple(self._told.pop(number, ())))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)

"""CUDA device literals and streams, as a CPU sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


def current_device() -> torch.device:
    """Stands for ``torch.cuda.current_device``: every buffer that asks for it lands in host memory."""
    return torch.device("cpu")


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stands for ``torch.cuda.synchronize``: the CPU has nothing in flight."""


def to_cuda(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Stands for ``Tensor.cuda``."""
    return tensor


class HostEvent:
    """Stands for a CUDA event: whatever it marks has already happened."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class HostStream:
    """Stands for ``torch.cuda.Stream``: operations on a CPU are in program order already."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, _stream: Any) -> None:
        """Nothing to order."""

    def wait_event(self, _event: Any) -> None:
        """Nothing to order."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, _event: Any = None) -> HostEvent:
        """An event that has happened."""
        return HostEvent()


_STREAM = HostStream()


def current_stream(*_args: Any, **_kwargs: Any) -> HostStream:
    """Stands for ``torch.cuda.current_stream``."""
    return _STREAM


def _on_host(factory: Callable[..., Any], mark: Callable[[], None]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            mark()
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            mark()
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


class _HostTorch(ModuleType):
    """The torch module as one Megatron module sees it: ``device='cuda'`` literals mean the CPU, pinned memory any."""

    def __init__(self, mark: Callable[[], None] = lambda: None) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_host(getattr(torch, name), mark))

    def counted_by(self, mark: Callable[[], None]) -> _HostTorch:
        """The same for one row of a manifest, where each literal that was met counts as a hit."""
        return _HostTorch(mark)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


host_torch = _HostTorch()


def eager() -> contextlib.AbstractContextManager[Any]:
    """Runs what Megatron compiled with ``jit_fuser`` eagerly: compiling takes 11 to 31 s and needs a compiler."""
    return torch.compiler.set_stance("force_eager")

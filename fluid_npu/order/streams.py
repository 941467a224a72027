"""Events, streams and synchronisations of torch.cuda and torch.npu, and reads of the host behind torch's back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fluid_npu.order.log import Log
from fluid_npu.order.memory import Memory, stream_name
from fluid_npu.order.patching import Patches
from fluid_npu.order.records import HOST


class StreamHooks:
    """Notes the calls while installed. ``Stream.wait_stream`` and the like go through the event's methods."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._events = 0

    def install(self, patches: Patches, module: Any) -> None:
        """Wraps Event, Stream and synchronize of torch.cuda or torch.npu."""
        patches.wrap(module.Event, "record", lambda old: self._on_stream(old, "record", module))
        patches.wrap(module.Event, "wait", lambda old: self._on_stream(old, "wait", module))
        patches.wrap(module.Event, "synchronize", lambda old: self._host(old, self._event))
        patches.wrap(module.Event, "query", lambda old: self._host(old, self._event))
        patches.wrap(module.Stream, "synchronize", lambda old: self._host(old, self._stream))
        patches.wrap(module.Stream, "query", lambda old: self._host(old, self._stream))
        patches.wrap(module, "synchronize", lambda old: self._device(old, module))

    def _event(self, event: Any) -> dict[str, str]:
        name = getattr(event, "_order_name", None)
        if name is None:
            self._events += 1
            name = event._order_name = f"event {self._events}"
        return {"event": name}

    def _stream(self, stream: Any) -> dict[str, str]:
        return {"stream": stream_name(stream)}

    def _on_stream(self, old: Any, kind: str, module: Any) -> Any:
        def call(event: Any, stream: Any = None) -> Any:
            at = time.perf_counter()
            chosen = module.current_stream() if stream is None else stream
            result = old(event, chosen)
            self._log.add(kind, stream=stream_name(chosen), at=at, **self._event(event))
            return result

        return call

    def _host(self, old: Any, what: Callable[[Any], dict[str, str]]) -> Any:
        """A synchronize(), or a query() that says yes: the host knows from here on."""

        def call(self_: Any) -> Any:
            at = time.perf_counter()
            result = old(self_)
            if result is not False:
                self._log.add("sync", at=at, **what(self_))
            return result

        return call

    def _device(self, old: Any, module: Any) -> Any:
        def synchronize(device: Any = None) -> Any:
            at = time.perf_counter()
            result = old(device)
            index = module.current_device() if device is None else torch.device(device).index
            kind = module.__name__.rpartition(".")[2]
            self._log.add("sync", device=f"{kind}:{index or 0}", at=at)
            return result

        return synchronize


def note_host_reads(patches: Patches, log: Log, memory: Memory) -> None:
    """``tolist`` and ``numpy`` read a tensor of the host without passing the dispatcher.

    ``cpu()`` of a tensor that is there already reads nothing, but the same line on an accelerator does: it counts.
    """

    def reading(old: Any, name: str) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                log.add("op", name=f"Tensor.{name}", stream=HOST, reads=memory.accesses([tensor]))
            return old(tensor, *args, **kwargs)

        return read

    for name in ("tolist", "numpy", "cpu"):
        patches.wrap(torch.Tensor, name, lambda old, name=name: reading(old, name))

"""What Megatron's optimizers are told of a tensor's type, on a CPU and on an NPU alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def typed_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``Tensor.type``: Megatron's optimizers compare it with ``'torch.cuda.FloatTensor'``.

    Only they are answered so; every other caller gets the true type.
    """

    def caller() -> str:
        frame = sys._getframe(2)  # above this function and type_name
        if frame.f_globals.get("__name__") == "fluid_npu.adaptor.hits" and frame.f_back is not None:
            frame = frame.f_back  # the registry's counter lies between
        return str(frame.f_globals.get("__name__", ""))

    def type_name(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        name = original(tensor, *args, **kwargs)
        if args or kwargs or not caller().startswith("megatron.core.optimizer"):
            return name
        return f"torch.cuda.{name.rpartition('.')[2]}"

    return type_name

"""Replacements of the feature ``npu``: what Megatron's CUDA names mean on an Ascend NPU without MindSpeed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fluid_npu.device.npu import cuda_names_mean_the_npu


@contextlib.contextmanager
def cuda_names() -> Iterator[None]:
    """torch_npu's ``contrib.transfer_to_npu``. It has no way back: a rollback leaves it as it is."""
    cuda_names_mean_the_npu()
    yield


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
        return name.replace("torch.npu.", "torch.cuda.", 1)

    return type_name

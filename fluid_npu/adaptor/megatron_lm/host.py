"""What Megatron-LM's own training loop assumes of CUDA, on a CPU; feature ``cpu_pretrain``, on top of ``cpu``."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fluid_npu.adaptor.cpu.devices import host_torch

_HELPERS = "megatron.core.datasets.helpers_cpp"


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stands for the warm-up of compiled functions, for CUDA kernels built at start and for the data sets' make."""


class _View(ModuleType):
    """A module as one other module sees it: some names are ours, the rest is the original."""

    def __init__(self, original: Any, **ours: Any) -> None:
        super().__init__(original.__name__)
        self._original = original
        for name, value in ours.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


#: ``torch`` in ``megatron.training.initialize``: one device that is there and needs no choosing. Process groups and
#: random states are made only where there is one.
initialize_torch = _View(
    host_torch,
    cuda=_View(torch.cuda, is_available=lambda: True, device_count=lambda: 1, set_device=nothing),
)


@contextlib.contextmanager
def dataset_helpers() -> Iterator[None]:
    """Loads the compiled helper of Megatron's data sets from the installed wheel where the checkout has none built.

    Raises ImportError with what to do when neither has it.
    """
    loaded = False
    if _HELPERS not in sys.modules and importlib.util.find_spec(_HELPERS) is None:
        _load(_helper_of_the_wheel())
        loaded = True
    try:
        yield
    finally:
        if loaded:
            sys.modules.pop(_HELPERS, None)


def _helper_of_the_wheel() -> Path:
    names = [f"helpers_cpp{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    folders = [Path(entry) / "megatron" / "core" / "datasets" for entry in sys.path]
    found = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    if not found:
        raise ImportError(
            f"{_HELPERS} is not built: run `make` in megatron/core/datasets of the Megatron-LM checkout, or install a "
            "megatron-core wheel of this Python beside it"
        )
    return found[0]


def _load(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(_HELPERS, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_HELPERS] = module

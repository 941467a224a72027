"""What Megatron-LM's own training loop assumes of CUDA, on a CPU; feature ``cpu_pretrain``, on top of ``cpu``."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fluid_npu.adaptor.cpu.devices import host_torch

_HELPERS = "megatron.core.datasets.helpers_cpp"


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stands for the warm-up of compiled functions, for CUDA kernels built at start and for the data sets' make."""


class _OneDevice(ModuleType):
    """``torch.cuda`` with one device that is there and needs no choosing."""

    def __init__(self, mark: Callable[[], None]) -> None:
        super().__init__("torch.cuda")
        self._mark = mark

    def is_available(self) -> bool:
        """True, for the assertion that opens ``initialize_megatron``."""
        self._mark()
        return True

    def device_count(self) -> int:
        """One: process groups and random states are made only where there is a device."""
        self._mark()
        return 1

    def set_device(self, _device: object) -> None:
        """Nothing to choose."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _InitializeTorch(ModuleType):
    """``torch`` as ``megatron.training.initialize`` sees it."""

    def __init__(self, mark: Callable[[], None] = lambda: None) -> None:
        super().__init__("torch")
        self.cuda = _OneDevice(mark)

    def counted_by(self, mark: Callable[[], None]) -> _InitializeTorch:
        """The same, where each question about devices counts as a hit."""
        return _InitializeTorch(mark)

    def __getattr__(self, name: str) -> Any:
        return getattr(host_torch, name)


initialize_torch = _InitializeTorch()


@contextlib.contextmanager
def dataset_helpers() -> Iterator[None]:
    """Loads the compiled helper of Megatron's data sets from the installed wheel where the checkout has none built.

    Raises ImportError with what to do when neither has it.
    """
    loaded = False
    modules = sys.modules  # When the interpreter ends, this runs after ``sys`` is gone.
    if _HELPERS not in modules and importlib.util.find_spec(_HELPERS) is None:
        _load(_helper_of_the_wheel())
        loaded = True
    try:
        yield
    finally:
        if loaded:
            modules.pop(_HELPERS, None)


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

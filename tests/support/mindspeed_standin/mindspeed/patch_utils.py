"""Registering, applying and removing patches as MindSpeed's module of the same name does."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def missing_function(name: str) -> Callable[..., Any]:
    def dummy_function(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError(f"function {name} no exist")

    return dummy_function


class Patch:
    def __init__(self, target: str, new: Any, create_dummy: bool) -> None:
        self.orig_module_name, _, self.orig_func_name = target.rpartition(".")
        self.orig_module: Any = None
        self.orig_func: Any = None
        self.patch_func: Any = None
        self.final_patch_func: Any = None
        self.wrappers: list[Callable[..., Any]] = []
        self.is_applied = False
        self.create_dummy = create_dummy
        self.set_patch_func(missing_function(target) if new is None else new)

    def set_patch_func(self, new: Any, force_patch: bool = False) -> None:
        if getattr(new, "__name__", "").endswith(("wrapper", "decorator")):
            self.wrappers += [] if new in self.wrappers else [new]
        elif self.patch_func is not None and not force_patch:
            raise RuntimeError(f"the patch of {self.orig_func_name} exist !")
        else:
            self.patch_func = new
        self.is_applied = False

    def apply_patch(self) -> None:
        if self.is_applied:
            return
        holder, current = self.parse_path(self.orig_module_name, self.orig_func_name, self.create_dummy)
        if self.orig_module is None:
            self.orig_module, self.orig_func = holder, current
        final = self.orig_func if self.patch_func is None else self.patch_func
        for wrapper in self.wrappers:
            final = wrapper(final)
        setattr(self.orig_module, self.orig_func_name, final)
        for module in list(sys.modules.values()):
            if hasattr(module, self.orig_func_name) and getattr(module, self.orig_func_name) is current:
                setattr(module, self.orig_func_name, final)
        self.is_applied, self.final_patch_func = True, final

    def remove_patch(self) -> None:
        last = self.orig_module_name.rpartition(".")[2]
        for name, module in list(sys.modules.items()):
            if "mindspeed" in name or name == "torch.classes":
                continue
            holder = getattr(module, last) if inspect.isclass(self.orig_module) and hasattr(module, last) else module
            if hasattr(holder, self.orig_func_name) and getattr(holder, self.orig_func_name) is self.final_patch_func:
                setattr(holder, self.orig_func_name, self.orig_func)
        self.patch_func, self.final_patch_func, self.is_applied = None, None, False

    @staticmethod
    def parse_path(path: str, attribute: str, create_dummy: bool) -> tuple[Any, Any]:
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            name, parent = ".".join(parts[:count]), ".".join(parts[: count - 1])
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                if parent and hasattr(sys.modules[parent], parts[count - 1]):  # a class
                    holder = getattr(sys.modules[parent], parts[count - 1])
                    return holder, getattr(holder, attribute)
                if not create_dummy:
                    raise
                sys.modules[name] = ModuleType(name)
                sys.modules[name].__file__ = "mindspeed.dummy_module.py"
                sys.modules[name].__spec__ = ModuleSpec(name, None)
                if parent:
                    setattr(sys.modules[parent], parts[count - 1], sys.modules[name])
        module = sys.modules[path]
        if not hasattr(module, attribute):
            setattr(module, attribute, None)
        return module, getattr(module, attribute)


class MindSpeedPatchesManager:
    patches_info: dict[str, Patch] = {}

    @staticmethod
    def register_patch(target: str, new: Any = None, force_patch: bool = False, create_dummy: bool = False) -> None:
        if target in MindSpeedPatchesManager.patches_info:
            MindSpeedPatchesManager.patches_info[target].set_patch_func(new, force_patch)
        else:
            MindSpeedPatchesManager.patches_info[target] = Patch(target, new, create_dummy)

    @staticmethod
    def apply_patches() -> None:
        for patch in MindSpeedPatchesManager.patches_info.values():
            patch.apply_patch()

    @staticmethod
    def remove_patches() -> None:
        for patch in MindSpeedPatchesManager.patches_info.values():
            patch.remove_patch()
            patch.wrappers.clear()

"""Where a patch goes: the object that holds the target, the attribute's name, and what is stored there.

Raw objects are read (``inspect.getattr_static``), so that a staticmethod is seen as one, and ``own`` says
whether the holder has the attribute itself or inherits it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fluid_npu.adaptor.patch import ImportFailed, PatchError


class _Missing:
    """Stands for "there is nothing"."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


@dataclass(frozen=True)
class Slot:
    """One attribute of one module or class."""

    holder: Any
    attribute: str

    @property
    def own(self) -> Any:
        """The raw object stored in the holder itself, or MISSING when it is inherited or absent."""
        return vars(self.holder).get(self.attribute, MISSING)

    @property
    def visible(self) -> Any:
        """What a reader finds, as a raw descriptor where the holder is a class; MISSING when nothing is there."""
        try:
            return inspect.getattr_static(self.holder, self.attribute)
        except AttributeError:
            return getattr(self.holder, self.attribute, MISSING)

    def write(self, value: Any) -> None:
        """Stores ``value``; MISSING deletes the holder's own entry."""
        if value is MISSING:
            delattr(self.holder, self.attribute)
        else:
            setattr(self.holder, self.attribute, value)


def resolve(target: str) -> Slot:
    """The slot that ``target`` names.

    ``a.b.C.method`` imports the longest importable module and walks the rest. Raises PatchError naming the
    part that does not exist, ImportFailed when the import of a module that exists raises.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            holder: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue
            raise _import_failed(target, module_name, error) from error
        except Exception as error:
            raise _import_failed(target, module_name, error) from error
        for part in parts[cut:-1]:
            if not hasattr(holder, part):
                raise PatchError(f"{target}: {module_name} has no {part!r}; was it renamed or removed upstream?")
            holder = getattr(holder, part)
        return Slot(holder, parts[-1])
    raise PatchError(f"{target}: no module of that name can be imported; is the package installed?")


def _import_failed(target: str, module: str, error: Exception) -> ImportFailed:
    return ImportFailed(f"{target}: importing {module} failed: {type(error).__name__}: {error}")

"""A replacement in the shape of what it replaces: staticmethod, classmethod and property stay what they are."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from fluid_npu.adaptor.fingerprint import unwrapped
from fluid_npu.adaptor.patch import Patch, PatchError

_DESCRIPTORS = (staticmethod, classmethod, property)


def shaped(patch: Patch, original: Any, replacement: Any) -> Any:
    """What to store for ``replacement`` in place of the raw ``original``.

    A plain function becomes the original's kind of method; of a property the getter, while setter and deleter stay.
    Raises PatchError when the replacement is a descriptor of another kind.
    """
    kind = next((kind for kind in _DESCRIPTORS if isinstance(original, kind)), None)
    given = next((kind for kind in _DESCRIPTORS if isinstance(replacement, kind)), None)
    if given is not None and given is not kind and patch.kind != "add":
        upstream = kind.__name__ if kind else type(original).__name__
        raise PatchError(
            f"{patch.name}: upstream's is a {upstream}, the replacement {patch.replacement} a {given.__name__}; "
            "write it as a plain function, which becomes what upstream's is"
        )
    if kind is None or not isinstance(replacement, FunctionType):
        return replacement
    if kind is property:
        return property(replacement, original.fset, original.fdel, original.__doc__)
    return kind(replacement)


def made(patch: Patch, original: Any) -> Any:
    """The object that the row puts in place of the raw ``original``: its replacement, or what its wrapper returns.

    A wrapper of a method is called with the function inside the descriptor, of a property with the getter.
    """
    replacement = patch.load_replacement()
    if patch.kind == "wrap":
        replacement = replacement(unwrapped(original))
    return shaped(patch, original, replacement)

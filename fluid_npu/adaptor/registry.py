"""Applies patches all or nothing and restores the exact objects in reverse order.

The raw descriptor is kept (a staticmethod stays one), and whether the attribute was the holder's own or
inherited. A rollback refuses when somebody else has patched on top of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fluid_npu.adaptor.patch import Patch, PatchError, resolve

_MISSING = object()


def _own(holder: Any, attribute: str) -> Any:
    """The raw object stored in the holder itself, or _MISSING when it is inherited or absent."""
    return vars(holder).get(attribute, _MISSING)


def _visible(holder: Any, attribute: str) -> Any:
    """What a reader finds, as a raw descriptor where the holder is a class."""
    try:
        return inspect.getattr_static(holder, attribute)
    except AttributeError:
        return getattr(holder, attribute, _MISSING)


@dataclass(frozen=True)
class _Applied:
    patch: Patch
    holder: Any
    attribute: str
    before: Any
    installed: Any


class Registry:
    """The patches applied through this object, in order."""

    def __init__(self) -> None:
        self._applied: list[_Applied] = []

    @property
    def applied(self) -> list[Patch]:
        """The patches in force, oldest first."""
        return [entry.patch for entry in self._applied]

    def apply(self, patches: Iterable[Patch]) -> None:
        """Checks every patch, then applies all of them; undoes all of this call if one fails.

        Raises:
            PatchError: a missing target, an existing target of ``add``, or two owners of one target.
        """
        rows = list(patches)
        self._check(rows)
        start = len(self._applied)
        try:
            for patch in rows:
                self._applied.append(self._install(patch))
        except Exception as error:
            self._undo_to(start)
            if isinstance(error, PatchError):
                raise
            raise PatchError(f"applying failed and was undone: {error}") from error

    def rollback(self, count: int = 0) -> None:
        """Restores all but the oldest ``count`` patches.

        Raises PatchError, changing nothing, if a target was patched again since.
        """
        # Of several wraps of one target only the outermost is in the holder's dict.
        outermost = {entry.patch.target: entry for entry in self._applied[count:]}
        foreign = [entry.patch.name for entry in outermost.values() if not self._is_ours(entry)]
        if foreign:
            raise PatchError(
                "cannot roll back: someone else patched on top of " + "; ".join(foreign) + ". Undo that first."
            )
        self._undo_to(count)

    def _check(self, rows: list[Patch]) -> None:
        owners = {entry.patch.target: entry.patch for entry in self._applied}
        for patch in rows:
            if patch.kind == "replace" and patch.target in owners:
                other = owners[patch.target]
                raise PatchError(f"conflict: {patch.name} and {other.name} both replace the same target")
            owners[patch.target] = patch
            patch.load_replacement()
            if patch.kind == "context":
                continue
            holder, attribute = resolve(patch.target)
            exists = _visible(holder, attribute) is not _MISSING
            if patch.kind == "add" and exists:
                raise PatchError(f"{patch.name}: kind 'add' but the target already exists; upstream grew its own")
            if patch.kind != "add" and not exists:
                raise PatchError(f"{patch.name}: the target does not exist; was it renamed or removed upstream?")

    def _install(self, patch: Patch) -> _Applied:
        replacement = patch.load_replacement()
        if patch.kind == "context":
            manager: AbstractContextManager[Any] = replacement()
            manager.__enter__()
            return _Applied(patch, None, "", _MISSING, manager)
        holder, attribute = resolve(patch.target)
        before = _own(holder, attribute)
        if patch.kind == "wrap":
            replacement = replacement(_visible(holder, attribute))
        setattr(holder, attribute, replacement)
        # What a reader of the holder's dict sees: setattr may store a different object (a property setter).
        return _Applied(patch, holder, attribute, before, _own(holder, attribute))

    @staticmethod
    def _is_ours(entry: _Applied) -> bool:
        if entry.patch.kind == "context":
            return True
        return _own(entry.holder, entry.attribute) is entry.installed

    def _undo_to(self, start: int) -> None:
        while len(self._applied) > start:
            entry = self._applied.pop()
            if entry.patch.kind == "context":
                entry.installed.__exit__(None, None, None)
            elif entry.before is _MISSING:
                delattr(entry.holder, entry.attribute)
            else:
                setattr(entry.holder, entry.attribute, entry.before)

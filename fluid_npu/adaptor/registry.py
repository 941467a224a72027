"""Applies patches all or nothing and restores the exact objects in reverse order.

The raw descriptor is kept (a staticmethod stays one), and whether the attribute was the holder's own or
inherited. A rollback refuses when somebody else has patched on top of ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fluid_npu.adaptor.checks import POLICIES, check, in_order
from fluid_npu.adaptor.patch import Patch, PatchError, PatchWarning
from fluid_npu.adaptor.target import MISSING, Slot, resolve


@dataclass(frozen=True, kw_only=True)
class Applied:
    """One patch in force. ``before`` and ``installed`` are the slot's own raw objects, MISSING where it had none."""

    patch: Patch
    slot: Slot
    before: Any = MISSING
    installed: Any = MISSING
    manager: AbstractContextManager[Any] | None = None

    @property
    def in_place(self) -> bool:
        """Whether the slot still holds what we put there."""
        return self.manager is not None or self.slot.own is self.installed


class Registry:
    """The patches applied through this object, in order."""

    def __init__(self) -> None:
        self._applied: list[Applied] = []
        self._suspended: list[Patch] = []

    @property
    def applied(self) -> list[Patch]:
        """The patches in force, oldest first."""
        return [entry.patch for entry in self._applied]

    @property
    def entries(self) -> tuple[Applied, ...]:
        """The same with what they changed."""
        return tuple(self._applied)

    @property
    def size(self) -> int:
        """How many patches are in force or suspended."""
        return len(self._applied) + len(self._suspended)

    @property
    def suspended(self) -> bool:
        """Whether ``suspend`` took rows off that ``resume`` has not put back."""
        return bool(self._suspended)

    def apply(self, patches: Iterable[Patch], fingerprints: str = "strict") -> None:
        """Checks every patch, then applies all of them; undoes all of this call if one fails.

        Args:
            patches: rows; wraps are applied after the others, else in the order given.
            fingerprints: 'strict' refuses rows whose upstream source changed; 'warn' warns.

        Raises:
            PatchError: with every problem that was found (see ``checks``); nothing was changed.
        """
        if fingerprints not in POLICIES:
            raise PatchError(f"fingerprints={fingerprints!r}: allowed are {', '.join(POLICIES)}")
        if self._suspended:
            raise PatchError("patches are suspended: call fluid_npu.adaptor.resume() before switching on more")
        rows = in_order(patches)
        found = check(rows, self.applied)
        problems = found.errors + (found.changes if fingerprints == "strict" else [])
        if problems:
            raise PatchError("\n".join(problems))
        for change in found.changes:
            warnings.warn(change, PatchWarning, stacklevel=2)
        self._install_all(rows)

    def rollback(self, count: int = 0) -> None:
        """Restores all but the oldest ``count`` patches; of suspended ones, forgets the rows.

        Raises PatchError, changing nothing, if a target was patched again since.
        """
        if self._suspended:
            del self._suspended[count:]
            return
        self._refuse_foreign(count)
        self._undo_to(count)

    def suspend(self) -> None:
        """Takes everything off, newest first, and remembers the rows. Raises PatchError as ``rollback`` does."""
        if self._suspended:
            raise PatchError("patches are suspended already")
        rows = self.applied
        self.rollback()
        self._suspended = rows

    def resume(self) -> None:
        """Puts the suspended rows back, in the same order, on top of what is there now.

        Raises PatchError, and stays suspended, when a row cannot be applied any more.
        """
        found = check(self._suspended, [])
        if found.errors:
            raise PatchError("\n".join(found.errors))
        self._install_all(self._suspended)
        self._suspended = []

    def _install_all(self, rows: list[Patch]) -> None:
        start = len(self._applied)
        try:
            for patch in rows:
                self._applied.append(self._install(patch))
        except Exception as error:
            self._undo_to(start)
            if isinstance(error, PatchError):
                raise
            raise PatchError(f"applying failed and was undone: {error}") from error

    def _install(self, patch: Patch) -> Applied:
        replacement, slot = patch.load_replacement(), resolve(patch.target)
        if patch.kind == "context":
            manager: AbstractContextManager[Any] = replacement()
            manager.__enter__()
            return Applied(patch=patch, slot=slot, manager=manager)
        before = slot.own
        if patch.kind == "wrap":
            replacement = replacement(slot.visible)
        slot.write(replacement)
        # What a reader of the holder's dict sees: setattr may store a different object (a property setter).
        return Applied(patch=patch, slot=slot, before=before, installed=slot.own)

    def _refuse_foreign(self, count: int) -> None:
        # Of several wraps of one target only the outermost is in the holder's dict.
        outermost = {entry.patch.target: entry for entry in self._applied[count:]}
        foreign = [entry.patch.name for entry in outermost.values() if not entry.in_place]
        if foreign:
            raise PatchError(
                "cannot roll back: someone else patched on top of " + "; ".join(foreign) + ". Undo that first."
            )

    def _undo_to(self, start: int) -> None:
        while len(self._applied) > start:
            entry = self._applied.pop()
            if entry.manager is not None:
                entry.manager.__exit__(None, None, None)
            else:
                entry.slot.write(entry.before)

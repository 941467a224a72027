"""Applies patches all or nothing and restores the exact objects in reverse order.

The raw descriptor is kept (a staticmethod stays one), and whether the attribute was the holder's own or inherited.
Other names of the same object are re-bound and restored with it (``references.py``). A rollback refuses when somebody
else has patched on top of ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fluid_npu.adaptor.checks import POLICIES, check, in_order, whereabouts
from fluid_npu.adaptor.fingerprint import unwrapped
from fluid_npu.adaptor.hits import Counted, counted
from fluid_npu.adaptor.patch import Patch, PatchError, PatchWarning
from fluid_npu.adaptor.references import Exchange, Name, late_names, names_of, sweepable
from fluid_npu.adaptor.shape import made
from fluid_npu.adaptor.target import MISSING, Slot, resolve


@dataclass(frozen=True, kw_only=True)
class Applied:
    """One patch in force.

    ``before`` and ``installed`` are the slot's own raw objects, MISSING where it had none; ``original`` is what a
    reader found there, inherited or not. ``names`` are the other names of the original that were re-bound.
    """

    patch: Patch
    slot: Slot
    original: Any = MISSING
    before: Any = MISSING
    installed: Any = MISSING
    names: tuple[Name, ...] = ()
    counted: Counted = Counted(None)
    manager: AbstractContextManager[Any] | None = None

    @property
    def exchange(self) -> Exchange:
        """The functions or classes behind the raw objects."""
        return Exchange(unwrapped(self.original), unwrapped(self.installed), self.slot)

    def foreign(self) -> list[str]:
        """What somebody else put in place of ours, in words; empty while all is as we left it."""
        if self.manager is not None:
            return []
        found = [] if self.slot.own is self.installed else [f"{self.patch.name}: {_now(self.slot.visible)}"]
        ours = self.exchange.new
        return found + [f"{name.path}: {_now(name.value)}" for name in self.names if name.value is not ours]


def _now(value: Any) -> str:
    thing = unwrapped(value)
    return f"there is now {whereabouts(thing) if hasattr(thing, '__qualname__') else repr(thing)}"


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

        Raises PatchError, changing nothing, if a target or one of its other names was patched again since.
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

    def _install_all(self, rows: Sequence[Patch]) -> None:
        start = len(self._applied)
        slots = [resolve(patch.target) for patch in rows]
        names = names_of([unwrapped(slot.own) for slot in slots])
        try:
            for patch, slot in zip(rows, slots, strict=True):
                self._applied.append(_install(patch, slot, names))
        except Exception as error:
            self._undo_to(start)
            if isinstance(error, PatchError):
                raise
            raise PatchError(f"applying failed and was undone: {type(error).__name__}: {error}") from error

    def _refuse_foreign(self, count: int) -> None:
        # Of several wraps of one target only the outermost is in the holder's dict, and under its other names.
        outermost = {entry.patch.target: entry for entry in self._applied[count:] if entry.manager is None}
        foreign = [text for entry in outermost.values() for text in entry.foreign()]
        if foreign:
            raise PatchError(
                "cannot roll back: someone else patched on top of " + "; ".join(foreign) + ". Undo that first."
            )

    def _undo_to(self, start: int) -> None:
        undone = self._applied[start:]
        known = [name for entry in undone for name in entry.names]
        late = late_names([entry.exchange for entry in undone if entry.manager is None], known)
        while len(self._applied) > start:
            _uninstall(self._applied.pop())
        for name, value in late:
            name.namespace[name.name] = value


def _install(patch: Patch, slot: Slot, names: dict[int, list[Name]]) -> Applied:
    """Puts one patch in force; ``names`` are the other names of the originals and follow to our object."""
    if patch.kind == "context":
        manager: AbstractContextManager[Any] = patch.load_replacement()()
        manager.__enter__()
        return Applied(patch=patch, slot=slot, manager=manager)
    original, before = slot.visible, slot.own
    ready = counted(made(patch, original), slot)
    try:
        slot.write(ready.value)
    except Exception:
        ready.undo()
        raise
    # What a reader of the holder's dict sees: setattr may store a different object (a property setter).
    entry = Applied(
        patch=patch, slot=slot, original=original, before=before, installed=slot.own, counted=ready, names=()
    )
    old, new = entry.exchange.old, entry.exchange.new
    if before is MISSING or not sweepable(old) or not sweepable(new):
        return entry
    others = tuple(name for name in names.get(id(old), []) if not name.is_slot(slot))
    for name in others:
        name.namespace[name.name] = new
    names[id(new)] = names.get(id(old), [])
    return Applied(**{**vars(entry), "names": others})


def _uninstall(entry: Applied) -> None:
    if entry.manager is not None:
        entry.manager.__exit__(None, None, None)
        return
    for name in entry.names:
        name.namespace[name.name] = entry.exchange.old
    entry.slot.write(entry.before)
    entry.counted.undo()

"""Functions of classes and modules replaced for a while; all go back in reverse order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Patches:
    """Undoes what it did, also where the attribute was inherited."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """``owner.name = make(old)``, where it has one."""
        old = getattr(owner, name, None)
        if old is None:
            return
        self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, make(old))

    def undo(self) -> None:
        """Everything as it was."""
        while self._undo:
            owner, name, old = self._undo.pop()
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

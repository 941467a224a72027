"""An automatic decision together with the reason for it, so that it can be printed once and questioned."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_announced: dict[str, tuple[str, Choice[Any]]] = {}


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value chosen automatically and why; unpacks as ``value, reason = choice``."""

    value: T
    reason: str

    def __iter__(self):  # type: ignore[no-untyped-def]  # the two fields differ in type
        return iter((self.value, self.reason))

    def announce(self, what: str) -> Choice[T]:
        """Print ``what: value (reason)`` once per process, and on rank 0 only; returns itself."""
        line = f"{what}: {self.value} ({self.reason})"
        if line not in _announced and os.environ.get("RANK", "0") in ("", "0"):
            print(line, flush=True)
        _announced[line] = (what, self)
        return self


def announced() -> list[tuple[str, Choice[Any]]]:
    """What was announced in this process and the choice, oldest first."""
    return list(_announced.values())

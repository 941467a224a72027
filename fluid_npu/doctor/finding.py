"""What a check says: items, gathered in sections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: ``ok``: as it should be; ``note``: worth knowing; ``warn``: it may hurt; ``wrong``: training does not work like this.
LEVELS = ("ok", "note", "warn", "wrong")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One finding. ``fix``: a command or an action, for ``warn`` and ``wrong``; ``details``: sentences below it."""

    name: str
    level: str
    text: str
    fix: str = ""
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level={self.level!r} is unknown; allowed: {', '.join(LEVELS)}")


@dataclass(frozen=True, kw_only=True)
class Section:
    """The findings of one subject. ``name`` is the key in JSON and never changes, ``title`` is for people."""

    name: str
    title: str
    items: tuple[Item, ...]


def worst(sections: Iterable[Section]) -> str:
    """The gravest level of all items; 'ok' when there are none."""
    levels = [LEVELS.index(item.level) for section in sections for item in section.items]
    return LEVELS[max(levels, default=0)]

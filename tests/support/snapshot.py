"""Every attribute of the modules and classes under some names, as it is stored, to be compared by identity."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

State = dict[tuple[str, str], Any]


def entries(places: Sequence[str]) -> Iterator[tuple[tuple[str, str], Any]]:
    """Each entry of each loaded module at or below ``places``, and of the classes found there that are not ours."""
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        if module is None or not any(name == place or name.startswith(place + ".") for place in places):
            continue
        for attribute, value in list(vars(module).items()):
            if attribute == "__warningregistry__":
                continue
            yield (name, attribute), value
            if isinstance(value, type) and id(value) not in seen and not value.__module__.startswith("fluid_npu"):
                seen.add(id(value))
                path = f"{name}.{attribute}"
                yield from (((path, key), item) for key, item in vars(value).items())
                yield (path, "__bases__"), value.__bases__


def differences(before: State, places: Sequence[str]) -> list[tuple[str, str]]:
    """What is not the identical object any more, and what has come or gone."""
    now = dict(entries(places))
    return [*changed(before, now), *(before.keys() ^ now.keys())]


def changed(before: State, now: State) -> list[tuple[str, str]]:
    """What is in both and not the identical object."""
    return [key for key, value in before.items() if key in now and now[key] is not value]

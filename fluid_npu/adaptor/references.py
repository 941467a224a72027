"""Other names for the object that a patch takes away.

``from x import f as g`` leaves a second name for the same function in another module. Such names are found by identity
over the dictionaries of all loaded modules, re-bound when the patch is applied and restored when it is rolled back.
Only functions and classes are looked for: None, numbers and strings are shared by code that has nothing to do with it.
Module ``__getattr__`` never runs, because only dictionaries are read.

Modules of fluid_npu are left alone: what they import from upstream they mean to be upstream's.
A name that a module binds while the patch is in force holds our object; it too gets the original back.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from fluid_npu.adaptor.target import MISSING, Slot

OURS = "fluid_npu"


@dataclass(frozen=True)
class Name:
    """One entry of one module's dictionary."""

    module: str
    name: str
    namespace: dict[str, Any]

    @property
    def value(self) -> Any:
        """What it holds now, MISSING if it is gone."""
        return self.namespace.get(self.name, MISSING)

    @property
    def path(self) -> str:
        """'package.module.name'."""
        return f"{self.module}.{self.name}"

    def is_slot(self, slot: Slot) -> bool:
        """Whether this is the slot itself."""
        return (
            isinstance(slot.holder, ModuleType) and vars(slot.holder) is self.namespace and slot.attribute == self.name
        )


def sweepable(value: Any) -> bool:
    """Whether a second name for this object can only mean the object: functions and classes."""
    return isinstance(value, (FunctionType, type))


def names_of(values: Iterable[Any]) -> dict[int, list[Name]]:
    """The module-level names of each of these objects, by ``id``; modules of fluid_npu are not looked at."""
    wanted = {id(value) for value in values if sweepable(value)}
    found: dict[int, list[Name]] = {identity: [] for identity in wanted}
    if wanted:
        for module, namespace in _namespaces():
            # Most modules have none of them, which C code says faster than a loop over all their names.
            if wanted.isdisjoint(map(id, list(namespace.values()))):
                continue
            for name, value in list(namespace.items()):
                if id(value) in wanted and not _defines(module, name, value):
                    found[id(value)].append(Name(module, name, namespace))
    return found


def _defines(module: str, name: str, value: Any) -> bool:
    """Whether MindSpeed defines there what it puts into Megatron: it would register ours at its next repatch."""
    return module.startswith("mindspeed.") and (value.__module__, value.__qualname__) == (module, name)


def _namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    seen = set()
    for key, module in list(sys.modules.items()):
        if not issubclass(type(module), ModuleType) or key == OURS or key.startswith(OURS + "."):
            continue
        # Past any __getattribute__ of a lazy module's class.
        namespace = ModuleType.__getattribute__(module, "__dict__")
        if id(namespace) not in seen:
            seen.add(id(namespace))
            yield key, namespace


@dataclass(frozen=True)
class Exchange:
    """An object that a patch took away, the one it put there, and which patch that was."""

    old: Any
    new: Any
    slot: Slot


def late_names(exchanges: Collection[Exchange], known: Collection[Name]) -> list[tuple[Name, Any]]:
    """Names bound to our objects by code that was loaded meanwhile, with what they get back.

    A function that we installed exists for that one patch, so every name of it counts. A class is our own and has
    names of its own right; only names equal to the target's, and names in the target's package, count.
    """
    by_new = {id(exchange.new): exchange for exchange in exchanges if sweepable(exchange.new)}
    recorded = {(id(name.namespace), name.name) for name in known}
    found = []
    for identity, names in names_of([exchange.new for exchange in by_new.values()]).items():
        exchange = by_new[identity]
        for name in names:
            if name.is_slot(exchange.slot) or (id(name.namespace), name.name) in recorded:
                continue
            if isinstance(exchange.new, type) and not _is_target_s(name, exchange.slot):
                continue
            found.append((name, _original(exchange, by_new)))
    return [(name, value) for name, value in found if value is not MISSING]


def _is_target_s(name: Name, slot: Slot) -> bool:
    holder = slot.holder.__module__ if isinstance(slot.holder, type) else slot.holder.__name__
    return name.name == slot.attribute or name.module.split(".")[0] == holder.split(".")[0]


def _original(exchange: Exchange, by_new: dict[int, Exchange]) -> Any:
    while id(exchange.old) in by_new:
        exchange = by_new[id(exchange.old)]
    return exchange.old

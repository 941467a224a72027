"""Who still holds the object that a patch took away, in places that cannot be re-bound safely.

A ModuleSpec built before, a functools.partial, a default argument, a dict or list that serves as a registry, a closure,
an attribute of an instance or of a class, subclasses and instances of a replaced class. They are found by asking the
garbage collector who refers to the original; that takes some tenths of a second, so it is done for reports alone.
What only a local variable holds is not told.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from fluid_npu.adaptor.references import OURS

_LEVELS = 4  # function <- cell <- tuple <- closure's function
_CONTAINERS = (dict, list, tuple, set, CellType, MethodType, staticmethod, classmethod, property)
# Annotations, weak references and mocks refer to functions and classes without ever calling them for the user.
_NOT_HOLDERS = ("builtins", "weakref", "_weakref", "functools", "types", "typing", "unittest.mock", "_abc")

Parents = dict[int, list[Any]]


@dataclass(frozen=True)
class Wanted:
    """An original, and the objects that hold it by right: our wrapper's closure, the descriptor it came in."""

    original: Any
    allowed: tuple[Any, ...] = ()


def captures(wanted: Sequence[Wanted]) -> list[tuple[str, ...]]:
    """For each original, in words, what still refers to it; sorted, without repeats."""
    originals = [item.original for item in wanted]
    parents = _parents(originals)
    results = []
    for item in wanted:
        allowed = {id(thing) for thing in item.allowed}
        found = set(_places(item.original, None, parents, allowed, _LEVELS))
        if isinstance(item.original, type):
            found |= set(_descendants(item.original, parents))
        results.append(tuple(sorted(found)))
    return results


def _parents(values: list[Any]) -> Parents:
    """Who refers to what, by ``id`` of what, level by level above the values."""
    parents: Parents = {}
    level, seen = values, {id(values), id(parents)}
    for _ in range(_LEVELS):
        if not level:
            break
        wanted = {id(value) for value in level} - parents.keys()
        seen.add(id(level))
        above = []
        for holder in gc.get_referrers(*level):
            if id(holder) in seen or isinstance(holder, FrameType) or _is_machinery(holder):
                continue
            for identity in {id(inner) for inner in gc.get_referents(holder)} & wanted:
                parents.setdefault(identity, []).append(holder)
            if isinstance(holder, _CONTAINERS) and not _is_namespace(holder):
                above.append(holder)
        level = above
    return parents


def _is_machinery(thing: Any) -> bool:
    return type(thing).__module__.startswith(f"{OURS}.adaptor.")


def _is_namespace(thing: Any) -> bool:
    """Whether this is a module's dictionary; nobody above it is of interest."""
    return isinstance(thing, dict) and isinstance(thing.get("__name__"), str) and "__spec__" in thing


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] == OURS


def _places(value: Any, below: Any, parents: Parents, allowed: Collection[int], levels: int) -> Iterator[str]:
    """In words, everything that can be named and refers to ``value``; ``below`` is what ``value`` itself refers to."""
    for holder in parents.get(id(value), []) if levels else []:
        if id(holder) in allowed:
            continue
        if _is_namespace(holder):
            yield from _in_module(value, holder)
        elif isinstance(holder, FunctionType):
            yield from _in_function(value, below, holder)
        elif isinstance(holder, type):
            yield from _in_class(value, below, holder)
        elif isinstance(holder, _CONTAINERS):
            yield from _places(holder, value, parents, allowed, levels - 1)
        elif not (isinstance(value, type) and type(holder) is value):
            yield from _in_instance(value, below, holder)


def _in_module(value: Any, namespace: dict[str, Any]) -> Iterator[str]:
    # The value itself under a name was re-bound when the patch was applied; here it is what contains the value.
    name = _key(namespace, value) if isinstance(value, _CONTAINERS) else None
    if name and not _is_ours(namespace["__name__"]):
        yield f"a {type(value).__name__}, {namespace['__name__']}.{name}"


def _in_function(value: Any, below: Any, function: FunctionType) -> Iterator[str]:
    if _is_ours(function.__module__):
        return
    if value is function.__defaults__ or value is function.__kwdefaults__:
        yield f"default argument of {_path(function)}"
    elif value is function.__closure__ and "__class__" not in function.__code__.co_freevars:
        yield f"closure of {_path(function)}"
    elif value is function.__dict__:
        yield f"attribute {_key(value, below)} of the function {_path(function)}"


def _in_class(value: Any, below: Any, cls: type) -> Iterator[str]:
    # A class refers to its dictionary and to the tuples of its bases; the latter are told by _descendants.
    if isinstance(value, dict) and not _is_ours(cls.__module__):
        yield f"class attribute {_path(cls)}.{_key(value, below)}"


def _in_instance(value: Any, below: Any, holder: Any) -> Iterator[str]:
    kind = type(holder)
    if isinstance(holder, partial):
        yield "a functools.partial"
    elif kind.__module__ not in _NOT_HOLDERS and not isinstance(holder, ModuleType):
        attributes = value if isinstance(value, dict) else getattr(holder, "__dict__", {})
        key = _key(attributes, below if isinstance(value, dict) else value)
        yield f"attribute {key} of an instance of {_path(kind)}" if key else f"content of an instance of {_path(kind)}"


def _key(namespace: dict[Any, Any], value: Any) -> Any:
    return next((key for key, item in list(namespace.items()) if item is value), None)


def _descendants(cls: type, parents: Parents) -> Iterator[str]:
    subclasses: list[type] = type.__subclasses__(cls)
    yield from (f"subclass {_path(sub)}" for sub in subclasses if not _is_ours(sub.__module__))
    instances = sum(type(holder) is cls for holder in parents.get(id(cls), []))
    if instances:
        yield f"{instances} instances made before"


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"

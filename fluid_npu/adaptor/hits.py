"""Counts how often a patch is reached, so that one which never is can be named.

What is counted, without changing what a reader sees:

* functions, static and class methods, properties (the getter): calls. What counts has the signature of ours
  (``__wrapped__``) and the name of the target, by which pickle refers to it;
* classes: constructions, through ``__init__`` of our class while the patch is in force; it stays the same object;
* modules that stand in for others: calls of their functions; with a method ``counted_by(mark)`` they say themselves
  what counts.

What cannot be counted: constants, contexts, instances, classes without an ``__init__`` written in Python, and objects
made by unpickling. Under torch.compile a call counts when it is traced, not when the compiled code runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from fluid_npu.adaptor.target import MISSING, Slot


class Counter:
    """The number of times one patch was reached; ``mark`` adds one."""

    def __init__(self) -> None:
        self.hits = 0

        def mark() -> None:
            self.hits += 1

        # torch.compile runs a function with this mark while tracing and keeps its result as a constant; without it the
        # changing number would be a guard and every call would compile again.
        mark._dynamo_marked_constant = True  # type: ignore[attr-defined]
        self.mark: Callable[[], None] = mark


@dataclass(frozen=True)
class Counted:
    """What to install. ``counter`` is None where nothing can be counted; ``undo`` restores what counting changed."""

    value: Any
    counter: Counter | None = None
    undo: Callable[[], None] = lambda: None


def counted(value: Any, slot: Slot) -> Counted:
    """``value``, ready to be installed in ``slot``, with its counter."""
    counter = Counter()
    if isinstance(value, FunctionType):
        return Counted(_function(value, counter, slot), counter)
    if isinstance(value, (staticmethod, classmethod)) and isinstance(value.__func__, FunctionType):
        return Counted(type(value)(_function(value.__func__, counter, slot)), counter)
    if isinstance(value, property) and isinstance(value.fget, FunctionType):
        getter = _function(value.fget, counter, slot)
        return Counted(property(getter, value.fset, value.fdel, value.__doc__), counter)
    if isinstance(value, type):
        return _class(value, counter)
    if hasattr(type(value), "counted_by"):
        return Counted(value.counted_by(counter.mark), counter)
    if isinstance(value, ModuleType):
        return Counted(_module(value, counter), counter)
    if isinstance(value, (BuiltinFunctionType, functools.partial)) and isinstance(slot.holder, ModuleType):
        return Counted(_function(value, counter, slot), counter)
    return Counted(value)


def _function(function: Callable[..., Any], counter: Counter, slot: Slot) -> Callable[..., Any]:
    mark = counter.mark

    @functools.wraps(function)
    def reached(*args: Any, **kwargs: Any) -> Any:
        mark()
        return function(*args, **kwargs)

    holder, attribute = slot.holder, slot.attribute
    if isinstance(holder, type):
        reached.__module__, reached.__qualname__ = holder.__module__, f"{holder.__qualname__}.{attribute}"
    else:
        reached.__module__, reached.__qualname__ = holder.__name__, attribute
    return reached


def _class(cls: type, counter: Counter) -> Counted:
    if not isinstance(inspect.getattr_static(cls, "__init__"), FunctionType):
        return Counted(cls)
    mark, own = counter.mark, vars(cls).get("__init__", MISSING)
    visible: Callable[..., None] = cls.__init__

    @functools.wraps(visible)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        mark()
        if own is MISSING:
            super(cls, self).__init__(*args, **kwargs)  # type: ignore[arg-type]
        else:
            visible(self, *args, **kwargs)

    try:
        cls.__init__ = __init__
    except TypeError:
        return Counted(cls)
    return Counted(cls, counter, lambda: Slot(cls, "__init__").write(own))


def _module(module: ModuleType, counter: Counter) -> ModuleType:
    """A module of the same name and content, whose functions count."""
    copy = ModuleType(module.__name__, module.__doc__)
    for name, value in vars(module).items():
        if isinstance(value, FunctionType):
            value = _function(value, counter, Slot(module, name))
        vars(copy)[name] = value
    return copy

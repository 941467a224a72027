"""Tests with the stand-in of MindSpeed in this process: import it, see what it changed, and take every trace away."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fluid_npu import adaptor
from fluid_npu.adaptor import PatchError, providers

STANDIN = Path(__file__).parent / "mindspeed_standin"
DUMMIES = ("mindspeed", "transformer_engine", "apex")
State = dict[tuple[str, ...], Any]


def state() -> State:
    """Every object that Megatron's modules, its classes and our modules above them hold, by place."""
    found: State = {}
    for name, module in list(sys.modules.items()):
        if name == "importlib.metadata" or name.startswith(("megatron.", "fluid_npu.mcore.")):
            for attribute, value in list(vars(module).items()):
                found[name, attribute] = value
                if inspect.isclass(value) and value.__module__ == name:
                    found.update({(name, attribute, inner): held for inner, held in list(vars(value).items())})
    return found


def changed(before: State, after: State) -> set[str]:
    """Dotted names of what is another object now, came or went, among the modules that were there before."""
    modules, nothing = {place[0] for place in before}, object()
    places = {place for place in before.keys() | after.keys() if place[0] in modules}
    differ = {place for place in places if before.get(place, nothing) is not after.get(place, nothing)}
    # Inside another class everything differs; copy.copy notes __slotnames__ in a class; an import adds a submodule.
    return {
        ".".join(place)
        for place in differ
        if place[-1] != "__slotnames__"
        and (len(place) == 2 or place[:2] not in differ)
        and getattr(after.get(place), "__name__", None) != ".".join(place)
    }


class Case:
    """The stand-in, not imported yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def adaptor(self, *flags: str) -> ModuleType:
        """What the user's line ``import mindspeed.megatron_adaptor`` does, with these flags in argv."""
        self._monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *flags])
        return import_module("mindspeed.megatron_adaptor")

    @property
    def manager(self) -> Any:
        return import_module("mindspeed.patch_utils").MindSpeedPatchesManager

    def installed(self, target: str) -> Any:
        """What MindSpeed itself last put on a target."""
        return self.manager.patches_info[target].final_patch_func


@contextmanager
def mindspeed_case(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """The stand-in on the path; at the end Megatron and ``sys.modules`` are as before, whatever happened."""
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(STANDIN))
        try:
            yield Case(patched)
        finally:
            _take_away()


def _take_away() -> None:
    if adaptor._ACTIVE:  # a test failed half-way
        with suppress(PatchError):
            adaptor._REGISTRY.rollback()
        adaptor._ACTIVE.clear()
        providers.detach()
    manager = getattr(sys.modules.get("mindspeed.patch_utils"), "MindSpeedPatchesManager", None)
    for patch in reversed(getattr(manager, "patches_info", {}).values()):
        if patch.orig_module is not None:
            _restore(patch.orig_module, patch.orig_func_name, patch.orig_func)
    for name in [name for name in sys.modules if name.split(".")[0] in DUMMIES]:
        del sys.modules[name]


def _restore(holder: Any, attribute: str, original: Any) -> None:
    theirs = getattr(holder, attribute)
    for place in [holder, *list(sys.modules.values())]:
        if attribute in vars(place) and vars(place)[attribute] is theirs:
            setattr(place, attribute, original)

"""MindSpeed beside us: ours always lie on top of its patches, and it never sees ours.

MindSpeed keeps each patch in ``MindSpeedPatchesManager.patches_info``; applying and removing sweeps all imported
modules and rebuilds from the object that it saw first. A wrap of ours that it finds in its way is dropped or left
dangling. So while any row of ours is on, the functions with which it applies and removes take ours off first and put
them back on top afterwards. Those functions are restored with our last row; MindSpeed's patches stay as it left them.

This module's name contains 'mindspeed', and MindSpeed's remove skips such modules: it must not hold a Megatron object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from types import ModuleType
from typing import Any

from fluid_npu.adaptor.patch import Patch, PatchError
from fluid_npu.adaptor.providers.base import Foreign, Ours
from fluid_npu.adaptor.providers.detect import Finding, detect_mindspeed
from fluid_npu.adaptor.providers.import_hook import after_import
from fluid_npu.adaptor.providers.rules import announce, meetings
from fluid_npu.adaptor.target import MISSING, Slot

_MODULE = "mindspeed.patch_utils"
#: What changes Megatron in it. Branches before 2.2.0 cannot remove; dump_patches applies a single Patch.
_CHANGES_MEGATRON = (
    ("MindSpeedPatchesManager", "apply_patches"),
    ("MindSpeedPatchesManager", "remove_patches"),
    ("Patch", "apply_patch"),
    ("Patch", "remove_patch"),
)


class MindSpeed:
    """Takes part in MindSpeed's apply and remove while our patches are on."""

    name = "mindspeed"

    def __init__(self) -> None:
        self._ours: Ours | None = None
        self._cancel: Callable[[], None] = lambda: None
        self._hooks: list[tuple[Slot, Any, Any]] = []
        self._inside = False

    def detect(self) -> Finding:
        return detect_mindspeed()

    def foreign(self) -> list[Foreign]:
        manager = getattr(sys.modules.get(_MODULE), "MindSpeedPatchesManager", None)
        patches = getattr(manager, "patches_info", {})
        records = (_foreign(target, patch) for target, patch in patches.items())
        return [record for record in records if record.by]

    def attach(self, ours: Ours) -> None:
        if self._ours is None:
            self._ours = ours
            self._cancel = after_import(_MODULE, self._hook)

    def detach(self) -> None:
        self._cancel()
        for slot, before, installed in reversed(self._hooks):
            # Where somebody wrapped ours, it stays inside and does nothing: _ours is None.
            if slot.own is installed:
                slot.write(before)
        self._hooks, self._ours = [], None

    def _hook(self, module: ModuleType) -> None:
        for holder_name, attribute in _CHANGES_MEGATRON:
            holder = getattr(module, holder_name, None)
            slot = Slot(holder, attribute)
            if holder is None or slot.own is MISSING:
                continue
            before = slot.own
            static = isinstance(before, staticmethod)
            around = self._below_ours(before.__func__ if static else before)
            slot.write(staticmethod(around) if static else around)
            self._hooks.append((slot, before, slot.own))

    def _below_ours(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """``theirs`` with our patches off while it runs, unless it runs inside another such call."""

        @wraps(theirs)
        def run(*args: Any, **kwargs: Any) -> Any:
            ours = self._ours
            if ours is None or self._inside:
                return theirs(*args, **kwargs)
            rows = ours.rows()
            ours.suspend()
            self._inside = True
            try:
                if theirs.__name__.startswith("apply"):
                    self._refuse_conflicts(rows)
                result = theirs(*args, **kwargs)
            finally:
                self._inside = False
                ours.resume()
            announce(meetings(rows, [record for record in self.foreign() if record.applied]))
            return result

        return run

    def _refuse_conflicts(self, rows: Sequence[Patch]) -> None:
        """Before it changes anything: a conflict must not be found half-way."""
        problems = [meeting.problem for meeting in meetings(rows, self.foreign()) if meeting.problem]
        if problems:
            raise PatchError("\n".join(problems))


def _foreign(target: str, patch: Any) -> Foreign:
    """A record of one of MindSpeed's Patch objects; ``by`` is empty where it was removed."""
    replacement, wrappers = patch.patch_func, tuple(patch.wrappers)
    applied = bool(patch.is_applied)
    return Foreign(
        owner="MindSpeed",
        target=target,
        replaces=replacement is not None,
        by=tuple(_name(item) for item in (replacement, *wrappers) if item is not None),
        applied=applied,
        upstream=patch.orig_func if applied else None,
        installed=patch.final_patch_func if applied else None,
    )


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"

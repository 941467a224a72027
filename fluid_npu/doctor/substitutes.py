"""apex, Transformer Engine, MindSpeed: the real one, an impostor or an empty module, and what each changes.

How they are told apart is in ``fluid_npu/adaptor/providers/detect.py``; here its findings become items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluid_npu.doctor.ask import Reply
from fluid_npu.doctor.finding import Item

_LEVELS = {"impostor": "warn", "other": "warn", "dummy": "note", "absent": "note"}
_FIXES = {
    "impostor": "pip uninstall apex (NVIDIA's is built from github.com/NVIDIA/apex)",
    "other": "uninstall it; Ascend's MindSpeed is installed from its repository, not from PyPI",
}


def substitute_items(reply: Reply) -> list[Item]:
    """One item a package; ``reply``: of the question 'substitutes'."""
    if reply.problem:
        text = f"apex, Transformer Engine and MindSpeed could not be looked at: {reply.problem}"
        return [Item(name="substitutes", level="warn", text=text, fix="repair what the message names")]
    items = [_item(finding, imported=reply.facts["imported"]) for finding in reply.facts["findings"]]
    if reply.facts["import_error"]:
        text = f"import mindspeed.megatron_adaptor fails: {reply.facts['import_error']}"
        fix = "repair MindSpeed's installation, or uninstall it: fluid_npu does not need it"
        items.append(Item(name="mindspeed import", level="warn", text=text, fix=fix))
    return items


def _item(finding: Mapping[str, Any], *, imported: bool) -> Item:
    state = finding["state"]
    after = " (as seen after import mindspeed.megatron_adaptor)" if imported else ""
    return Item(
        name=finding["name"],
        level=_LEVELS.get(state, "ok"),
        text=f"{state}: {finding['detail']}{after}",
        fix=_FIXES.get(state, ""),
        details=tuple(finding["changes"]),
    )

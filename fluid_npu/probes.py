"""Is a package really there? For probes that must not be fooled by a stand-in in ``sys.modules``.

MindSpeed plants empty modules named transformer_engine, apex, amp_C and others, so that Megatron's imports of them
succeed; ``importlib.util.find_spec`` then finds them as well. Such a module was made by hand: nothing loaded it.
Imports the standard library alone, so that every package of ours may ask.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import NamedTuple

#: What MindSpeed writes into ``__file__`` of the modules that it makes (mindspeed/patch_utils.py, all branches).
MINDSPEED_DUMMY_FILE = "mindspeed.dummy_module.py"


class Probe(NamedTuple):
    """An answer and how it was seen."""

    value: bool
    reason: str


def mindspeed_dummy(name: str) -> bool:
    """Whether the imported module ``name`` is one of MindSpeed's empty ones."""
    return getattr(sys.modules.get(name), "__file__", None) == MINDSPEED_DUMMY_FILE


def installed(name: str) -> Probe:
    """Whether the top-level package ``name`` can be imported from a real place, and how that was seen."""
    if mindspeed_dummy(name):
        return Probe(False, f"the {name} that Python sees is MindSpeed's dummy module")
    module = sys.modules.get(name)
    if module is not None:
        if getattr(getattr(module, "__spec__", None), "loader", None) is None:
            return Probe(False, f"the {name} that Python sees is a module made by hand, without a loader")
        return Probe(True, f"{name} is imported")
    # None in sys.modules blocks the import; find_spec answers None for it.
    if find_spec(name) is None:
        return Probe(False, f"{name} is not installed")
    return Probe(True, f"{name} is installed")

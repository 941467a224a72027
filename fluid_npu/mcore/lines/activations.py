"""Megatron's own activation functions by the form that they are (``device.kernels.activations.FORMS``).

Found where a line has them: ``megatron.core.activations`` is not in 0.12. ``erf_gelu`` is left out, because it divides
by 1.41421 and not by the root of 2.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

_FORMS = {
    ("megatron.core.activations", "squared_relu"): "squared relu",
    ("megatron.core.activations", "quick_gelu"): "quick gelu",
    ("megatron.core.activations", "fast_gelu"): "gelu tanh",
    ("megatron.core.transformer.utils", "openai_gelu"): "gelu tanh",
}


def megatron_form(function: Callable[[Tensor], Tensor]) -> str | None:
    """The form of one of Megatron's functions, by identity; None for any other, torch's too."""
    return next((form for place, form in _FORMS.items() if function is _found(*place)), None)


def _found(module: str, name: str) -> Any:
    """What this line has there; None where it has nothing, which is no function."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None

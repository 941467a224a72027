"""Constructor and function arguments that only some lines have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any


def taken(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that ``function`` takes; all where it takes any.

    Raises ValueError for one that it does not take and that says something (neither None nor False).
    """
    parameters = _parameters(function)
    if parameters is None:
        return arguments
    for name, value in arguments.items():
        if name not in parameters and value not in (None, False):
            raise ValueError(
                f"{name}={value!r}: {function.__qualname__} of the installed megatron-core takes no such argument; "
                "leave it out, or use a line that has it (docs/MEGATRON_VERSIONS.md)"
            )
    return {name: value for name, value in arguments.items() if name in parameters}


@lru_cache(maxsize=64)  # asked in every forward, where reading a signature takes as long as a launch
def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """The names that it takes; None for any."""
    found = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()):
        return None
    return frozenset(found)

"""What calls that must not work say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest


def value_errors(calls: Mapping[str, Callable[[], Any]]) -> dict[str, str]:
    """The message of each call's ValueError. Fails for a call that raises none."""
    messages = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        messages[name] = str(caught.value)
    return messages

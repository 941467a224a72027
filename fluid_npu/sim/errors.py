"""The one error of this package."""

from __future__ import annotations


class SimError(RuntimeError):
    """The simulator cannot be prepared here; the message says what to do."""

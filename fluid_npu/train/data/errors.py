"""The one error of the data package."""

from __future__ import annotations


class DataError(RuntimeError):
    """Data that is missing, corrupt, too small or cannot be written; the text ends with what to do."""

"""The headless browser of tests: Debian's chromium, or Chrome."""

from __future__ import annotations

import shutil


def find_browser() -> str | None:
    """Its path, or None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)

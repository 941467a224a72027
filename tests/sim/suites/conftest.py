"""Tests that need the simulator itself, such as its delays; tests/sim/test_suites.py runs them on it."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("FLUID_SIM") else ["test_*.py"]

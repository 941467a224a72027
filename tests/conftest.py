"""What all tests share: the repository root on the path (for ``tests.support``) and the multi-process helper."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two ranks share two cores
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """``run_ranks(nproc, function, *args, sizes=..., timeout=...)``: see ``tests/support/ranks.py``."""
    from tests.support import ranks

    return ranks.run_ranks

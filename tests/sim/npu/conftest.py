"""Tests that need an NPU, real or simulated; ``tests/sim/test_on_the_simulator.py`` runs them in one process of it.

On hardware: ``FLUID_NPU_TESTS=1 python -m pytest tests/sim/npu``. Elsewhere they are not collected.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

HERE = bool(os.environ.get("FLUID_SIM") or os.environ.get("FLUID_NPU_TESTS"))
collect_ignore_glob = [] if HERE else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def torch_npu():
    """The installed torch_npu, on device 0."""
    from fluid_npu.device.npu import load_torch_npu

    module = load_torch_npu()
    module.npu.set_device(0)
    return module


@pytest.fixture(autouse=True)
def seed():
    """The same numbers in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def operator_log():
    """``with operator_log() as ran:``: a Counter of the (kind, name) that ran inside, filled at its end.

    Needs the simulator's ``--log``.
    """
    import torch

    from fluid_npu.sim.operator_log import read_log

    folder = os.environ["FLUID_SIM_LOG"]

    @contextmanager
    def watched() -> Iterator[Counter[tuple[str, str]]]:
        torch.npu.synchronize()
        before, ran = read_log(folder), Counter()
        yield ran
        torch.npu.synchronize()
        ran.update(read_log(folder) - before)

    return watched

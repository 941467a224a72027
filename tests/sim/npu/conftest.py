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


class OperatorLog:
    """The log that the simulator's ``--log`` writes; ``with log() as ran:`` gives what ran inside, at its end."""

    def now(self) -> Counter[tuple[str, str]]:
        """How often each (kind, name) has run until now; nothing on hardware and without ``--log``."""
        import torch

        from fluid_npu.sim.operator_log import read_log

        torch.npu.synchronize()
        return read_log(os.environ["FLUID_SIM_LOG"]) if "FLUID_SIM_LOG" in os.environ else Counter()

    @contextmanager
    def __call__(self) -> Iterator[Counter[tuple[str, str]]]:
        before, ran = self.now(), Counter()
        yield ran
        ran.update(self.now() - before)


@pytest.fixture(scope="session")
def operator_log() -> OperatorLog:
    return OperatorLog()

"""What all tests share: the repository root on the path (for ``tests.support``) and the multi-process helper.

``--device npu`` runs the tests of layer, dispatcher, scheduler, trainer and operators on an NPU, real or simulated.
Tests for other hardware and the long grids are deselected, so that they are counted and a skip stays an exception.
With FLUID_FORBID_SKIPS=1, as scripts/test.sh sets it, a skipped test fails: it tested nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and processes that are interrupted here would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two ranks share two cores
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """``run_ranks(nproc, function, *args, sizes=..., timeout=...)``: see ``tests/support/ranks.py``."""
    from tests.support import ranks

    return ranks.run_ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device``, which tests/support/device.py reads, in the processes of ``run_ranks`` too."""
    default = os.environ.get("FLUID_TEST_DEVICE", "cpu")
    parser.addoption("--device", choices=("cpu", "npu"), default=default, help="where the tests put their tensors")


def pytest_configure(config: pytest.Config) -> None:
    """Passes the device on, and loads torch_npu: after a first backward without it autograd knows of no NPU.

    hypothesis draws the same examples in every run, new ones at night alone, and does not mind a busy machine.
    """
    from hypothesis import HealthCheck, settings

    kept = {"derandomize": "nightly" not in config.option.markexpr, "deadline": None, "database": None}
    settings.register_profile("fluid", print_blob=True, suppress_health_check=[HealthCheck.too_slow], **kept)
    settings.load_profile("fluid")
    os.environ["FLUID_TEST_DEVICE"] = config.getoption("--device")
    if config.getoption("--device") == "npu":
        from fluid_npu.device.npu import load_torch_npu

        load_torch_npu()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what this run or this machine is not for."""
    import torch

    from fluid_npu.link import why_unavailable
    from tests.support.browser import find_browser

    away = set() if "nightly" in config.option.markexpr else {"nightly"}
    if not torch.cuda.is_available():
        away.add("cuda")
    if any(item.get_closest_marker("link") for item in items) and why_unavailable() is not None:
        away.add("link")
    if find_browser() is None:
        away.add("browser")
    if config.getoption("--device") != "cpu":
        away.add("host")
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in away)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A skip inside a test or its fixtures."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A skip of a whole module."""
    report = yield
    if report.outcome == "skipped":
        _forbid_skip(report)
    return report


def _forbid_skip(report: Any) -> None:
    if os.environ.get("FLUID_FORBID_SKIPS") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason}\nFLUID_FORBID_SKIPS=1: a skipped test is an error; install what it needs"

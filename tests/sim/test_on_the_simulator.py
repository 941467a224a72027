"""Builds the simulated NPU and runs the tests of ``tests/sim/npu`` on it, all in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fluid_npu.sim.info import collectives, operators
from fluid_npu.sim.operator_log import read_log

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run of the inner tests; the folder holds their report and the operator log."""
    folder = tmp_path_factory.mktemp("simulated")
    words = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "tests/sim/npu", f"--junitxml={folder}/report.xml"]
    command = [sys.executable, "-m", "fluid_npu", "sim", "exec", "--log", str(folder / "log"), "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done, folder


@pytest.mark.timeout(1500)  # the first run installs torch-npu and compiles
def test_the_tests_on_the_npu_pass(run) -> None:
    done, folder = run
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    (suite,) = ElementTree.parse(folder / "report.xml").getroot().iter("testsuite")
    assert int(suite.attrib["tests"]) >= 160 and suite.attrib["skipped"] == "0"


def test_every_simulated_operator_and_collective_ran(run) -> None:
    counts = read_log(run[1] / "log")
    ran = {name for kind, name in counts if kind in ("aclnn", "hccl")}
    # op-plugin asks whether the fourth version is there and then calls the fifth.
    assert ran == {*operators(), *collectives()} - {"aclnnGroupedMatmulV4"}
    assert not [name for kind, name in counts if kind == "missing"]


@pytest.mark.nightly
def test_the_contracts_of_the_910c_are_those_of_the_910b(tmp_path: Path) -> None:
    """op-plugin calls the adding matmul without group_list_type there too; runtime and values are the same code."""
    inner = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "tests/sim/npu/test_contracts.py"]
    inner += ["tests/sim/npu/test_operators.py", "tests/sim/npu/test_branches.py"]
    before = [sys.executable, "-m", "fluid_npu", "sim", "exec", "--soc", "910C", "--log", str(tmp_path / "log"), "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*before, *inner], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_info_names_what_is_there() -> None:
    command = [sys.executable, "-m", "fluid_npu", "sim", "info", "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert facts["torch_npu"] == "2.13.0" and facts["socs"] == ["910B", "910C"]
    assert "aclnnGroupedMatmulAdd" in facts["operators"] and "HcclAlltoAllV" in facts["collectives"]

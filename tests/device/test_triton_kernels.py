"""The Triton kernels: in Triton's interpreter on a CPU, in a process of its own, and on a GPU where there is one.

For the interpreter Triton is the one that scripts/megatron_lines.py unpacks for newer lines of Megatron, where it is
there: the interpreter of older ones fails with numpy 2.4. It stays out of this process: the interpreter is switched on
when the kernels are imported, for good.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.triton_cases import CASES

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / ".megatron" / f"triton-{sys.implementation.cache_tag}"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """What went wrong in each case, None where nothing did."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    if TRITON.is_dir():
        paths.insert(0, str(TRITON))
    assert TRITON.is_dir() or importlib.util.find_spec("triton"), (
        f"{TRITON} is missing: python scripts/megatron_lines.py install"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": "1",
        "FLUID_ROW_KERNELS": "triton",
        "FLUID_GROUPED_GEMM": "triton",
    }
    command = [sys.executable, "-m", "tests.support.triton_cases"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    return {line["case"]: line["failure"] for line in lines}


@pytest.mark.host
@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUID_ROW_KERNELS", "triton")
    monkeypatch.setenv("FLUID_GROUPED_GEMM", "triton")
    CASES[name]("cuda")


@pytest.mark.host
def test_a_process_that_computes_on_a_cpu_imports_no_triton() -> None:
    code = (
        "import sys, torch; from fluid_npu.device import kernels_of; k = kernels_of(torch.zeros(1));"
        "k.grouped_mm(torch.ones(4, 8), torch.ones(2, 8, 8), [3, 1]); assert 'triton' not in sys.modules"
    )
    paths = os.pathsep.join([str(TRITON), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()

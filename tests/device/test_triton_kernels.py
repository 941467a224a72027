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
from typing import Any

import pytest

from tests.support.triton_cases import CASES

ROOT = Path(__file__).resolve().parents[2]
TRITON = ROOT / ".megatron" / f"triton-{sys.implementation.cache_tag}"


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the launches of the interpreted checks are noted."""
    return tmp_path_factory.mktemp("triton") / "launches.jsonl"


def json_lines(*arguments: str, **settings: str) -> list[dict[str, Any]]:
    """What tests.support.triton_launches prints, with the Triton that the module's docstring names."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    if TRITON.is_dir():
        paths.insert(0, str(TRITON))
    assert TRITON.is_dir() or importlib.util.find_spec("triton"), (
        f"{TRITON} is missing: python scripts/megatron_lines.py install"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **settings}
    command = [sys.executable, "-m", "tests.support.triton_launches", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    return lines


@pytest.fixture(scope="module")
def interpreted(launches: Path) -> dict[str, str | None]:
    """What went wrong in each case, None where nothing did."""
    forced = {"FLUID_ROW_KERNELS": "triton", "FLUID_GROUPED_GEMM": "triton"}
    lines = json_lines("record", str(launches), TRITON_INTERPRET="1", **forced)
    return {line["case"]: line["failure"] for line in lines}


@pytest.mark.host
@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


@pytest.mark.host
@pytest.mark.parametrize("every", [[], pytest.param(["all"], marks=pytest.mark.nightly)], ids=["one launch", "all"])
def test_every_kernel_compiles_for_hopper(
    interpreted: dict[str, str | None], launches: Path, tmp_path: Path, every: list[str]
) -> None:
    lines = json_lines("compile", str(launches), *every, TRITON_CACHE_DIR=str(tmp_path))
    assert [line for line in lines if line["failure"]] == []
    launched = {kernel for line in launches.read_text().splitlines() if (kernel := json.loads(line)["kernel"])}
    assert launched <= {line["kernel"].partition(" ")[0].rpartition(".")[2] for line in lines}
    spilling = [line["kernel"] for line in lines if line["stack"] or line["local"]]
    assert not spilling, "these keep registers in memory"


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

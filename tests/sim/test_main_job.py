"""The trainer on two simulated NPUs over HCCL continues a CPU's checkpoint as the CPU does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.sim.operator_log import read_log
from tests.support.training import data_prefix

TOLERANCE = 1e-5  # relative, of losses and gradient norms in fp32
USED = {"aclnnGroupedMatmulV5", "aclnnMoeTokenPermute", "aclnnMoeTokenUnpermute", "aclnnSwiGlu", "aclnnSwiGluGrad"}


def train(out: Path, device: str, steps: int, *more: str, log: Path | None = None) -> None:
    """``fluid-npu train``, on the simulator for an NPU."""
    flags = {"preset": "mixtral-tiny", "nproc": 2, "dtype": "fp32", "lr-decay-steps": 10, "warmup-steps": 1}
    flags |= {"data": data_prefix(), "device": device, "steps": steps, "out": out}
    words = ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), *more]
    before = ["sim", "exec", "--log", str(log), "--", sys.executable, "-m", "fluid_npu"] if log else []
    command = [sys.executable, "-m", "fluid_npu", *before, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(1500)  # the first run installs torch-npu and compiles
def test_the_npu_continues_a_cpu_s_checkpoint_as_the_cpu_does(tmp_path: Path) -> None:
    cpu, npu = tmp_path / "cpu", tmp_path / "npu"
    train(cpu, "cpu", 1)
    shutil.copytree(cpu, npu)
    train(cpu, "cpu", 3, "--resume")
    train(npu, "npu", 3, "--resume", log=tmp_path / "log")
    for here, there in zip(metrics(npu)[1:], metrics(cpu)[1:], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=TOLERANCE)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=TOLERANCE)
    counts = read_log(tmp_path / "log")
    assert {name for kind, name in counts if kind == "aclnn"} >= USED
    assert counts["hccl", "HcclAlltoAllV"] > 0
    assert not [name for kind, name in counts if kind in ("fallback", "missing", "refused")]

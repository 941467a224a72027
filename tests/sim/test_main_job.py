"""The trainer on two simulated NPUs continues a CPU's checkpoint as the CPU does, with the NPU's own operators."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fluid_npu.sim.operator_log import read_log
from tests.support.training import data_prefix

#: Relative, of losses and gradient norms at each step after the common checkpoint. fp32: the two sum in another
#: order. bf16: the NPU's operators round once where Megatron's attention, norm and rotary embedding round at each step.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}
START, STEPS = 2, 4
CUT = ("--layers", "2", "--seq-length", "64")
#: Rows that are sent in pieces (overlap 'full') are gathered piece by piece instead, so that the first can leave early.
PERMUTE = "aclnnMoeTokenPermute"
ALWAYS = {
    *("aclnnGroupedMatmulV5", "aclnnMoeTokenUnpermute", "aclnnSwiGlu", "aclnnSwiGluGrad"),
    *("aclnnRmsNorm", "aclnnRmsNormGrad", "aclnnRotaryPositionEmbedding", "aclnnRotaryPositionEmbeddingGrad"),
    *("aclnnFlashAttentionScore", "aclnnFlashAttentionScoreGrad"),
}


def train(out: Path, device: str, dtype: str, *more: str, log: Path | None = None) -> str:
    """``fluid-npu train``, on the simulator for an NPU; returns what it printed."""
    flags = {"preset": "mixtral-tiny", "nproc": 2, "dtype": dtype, "lr-decay-steps": 10, "warmup-steps": 1}
    flags |= {"data": data_prefix(), "device": device, "steps": STEPS, "checkpoint-every": START, "out": out}
    words = ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), *more]
    before = ["sim", "exec", "--log", str(log), "--", sys.executable, "-m", "fluid_npu"] if log else []
    command = [sys.executable, "-m", "fluid_npu", *before, *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def start_of(cpu: Path, npu: Path) -> None:
    """Copies a finished run as it was after ``START`` steps."""
    shutil.copytree(cpu, npu, ignore=shutil.ignore_patterns(f"step_{STEPS:06d}", "summary.json"))
    lines = (npu / "metrics.jsonl").read_text().splitlines(keepends=True)
    (npu / "metrics.jsonl").write_text("".join(lines[:START]))


def continued(folder: Path, dtype: str, *cut: str) -> tuple[Counter[tuple[str, str]], str]:
    """Checks that the NPU continues as the CPU does; returns the operator log and what the NPU's run printed."""
    cpu, npu = folder / "cpu", folder / "npu"
    train(cpu, "cpu", dtype, *cut)
    start_of(cpu, npu)
    printed = train(npu, "npu", dtype, "--resume", *cut, log=folder / "log")
    here, there = metrics(npu), metrics(cpu)
    assert len(here) == len(there) == STEPS
    for step, (one, other) in enumerate(zip(here, there, strict=True)):
        for figure in ("loss", "grad_norm"):
            assert one[figure] == pytest.approx(other[figure], rel=TOLERANCE[dtype]), f"{figure} after {step} steps"
    return read_log(folder / "log"), printed


def operators(counts: Counter[tuple[str, str]], printed: str) -> set[str]:
    """The NPU operators that ran; nothing was computed on the host, missing or refused. The permute is the plan's."""
    assert not [name for kind, name in counts if kind in ("fallback", "missing", "refused")]
    assert counts["hccl", "HcclAlltoAllV"] > 0
    ran = {name for kind, name in counts if kind == "aclnn"}
    assert (PERMUTE in ran) == ("overlap: full (" not in printed)
    return ran


@pytest.mark.timeout(1500)  # the first run installs torch-npu and compiles
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param((), id="auto"),  # plans from what it measures, so any plan may run here
        pytest.param((*CUT, "--overlap", "full", "--moe-chunks", "2", "--local-first"), id="pieces"),
    ],
)
def test_fp32_takes_every_operator_but_the_adding_matmul(cut: tuple[str, ...], tmp_path: Path) -> None:
    counts, printed = continued(tmp_path, "fp32", *cut)
    ran = operators(counts, printed)
    assert ran >= ALWAYS and "aclnnGroupedMatmulAdd" not in ran
    assert "expert dW: dW, then add_ (npu_grouped_matmul_add_ wants fp16 or bf16)" in printed
    assert "attention: fused (npu_fusion_attention takes it)" in printed


@pytest.mark.timeout(1500)
def test_bf16_adds_its_weight_gradients_into_main_grad_in_the_operator(tmp_path: Path) -> None:
    counts, printed = continued(tmp_path, "bf16", *CUT, "--overlap", "dw")  # 'auto' would measure dW, which counts too
    ran = operators(counts, printed)
    assert ran >= {*ALWAYS, PERMUTE, "aclnnGroupedMatmulAdd"}
    # Each dW of FC1 and FC2 of each layer, step and rank; no other matmul groups the inner dimension.
    assert counts["aclnn", "aclnnGroupedMatmulAdd"] == 2 * 2 * (STEPS - START) * 2
    assert "expert dW: npu_grouped_matmul_add_ (npu_grouped_matmul_add_ takes it)" in printed


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_a_single_local_expert_takes_no_grouped_operator(tmp_path: Path) -> None:
    counts, printed = continued(tmp_path, "bf16", *CUT, "--experts", "2")
    ran = operators(counts, printed)
    assert not [name for name in ran if name.startswith("aclnnGroupedMatmul")]
    assert ran >= ALWAYS - {"aclnnGroupedMatmulV5"}
    assert "expert dW: dW, then add_ (npu_grouped_matmul_add_ wants more than one local expert)" in printed

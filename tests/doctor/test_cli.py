"""The command itself, on this machine and on one where everything is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECTIONS = ["hardware", "packages", "megatron", "substitutes", "environment", "patches", "overlap"]


def doctor(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fluid_npu", "doctor", *words]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True)


def test_this_machine_can_train_and_a_planted_variable_is_found() -> None:
    done = doctor("--json", "--timeout", "250", CUDA_LAUNCH_BLOCKING="1", CUDA_DEVICE_MAX_CONNECTIONS="32")
    values = json.loads(done.stdout)
    assert list(values["sections"]) == SECTIONS
    wrong = [item for items in values["sections"].values() for item in items if item["level"] == "wrong"]
    assert (done.returncode, values["verdict"], wrong, done.stderr) == (0, "warn", [], "")
    levels = {item["name"]: item["level"] for item in values["sections"]["environment"]}
    assert levels["CUDA_LAUNCH_BLOCKING"] == "warn" and levels["CUDA_DEVICE_MAX_CONNECTIONS"] == "ok"
    assert {item["name"] for item in values["sections"]["patches"]} >= {"cpu", "no_te"}
    assert values["overlap"]["device"] in ("cpu", "cuda", "npu") and values["next"][-1] == "fluid-npu doctor --dtypes"


def test_a_machine_where_everything_is_broken_gives_one_screen_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").write_text("raise ImportError('no')")
    tool = tmp_path / "npu-smi"
    tool.write_text("#!/bin/sh\necho 'dcmi model initialized failed' >&2; exit 255\n")
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = doctor(PYTHONPATH=str(tmp_path), PATH=path, HCCL_OP_EXPANSION_MODE="AIV", ASCEND_HOME_PATH="/gone")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    words = " ".join(done.stdout.split())  # lines are wrapped
    for expected in (
        "!! torch",
        "libtorch.so: cannot open shared object file",
        " ? npu-smi",
        "dcmi model initialized failed",
        " ? CANN",
        " ? apex",
        f"unknown version from {tmp_path} (PYTHONPATH)",
        " ? HCCL_OP_EXPANSION_MODE",
        "!! patches",
        "not checked: PatchError: megatron-core is not installed",
    ):
        assert expected in done.stdout or expected in words
    assert len(done.stdout.splitlines()) <= 90


def test_the_dtype_matrix_is_tried_on_this_cpu() -> None:
    done = doctor("--dtypes", "--json")
    rows = json.loads(done.stdout)["rows"]
    tried = {(row["megatron"], row["dtype"]): row["ours"]["cpu"].get("tried_here") for row in rows if row["installed"]}
    assert done.returncode == 0 and set(tried.values()) == {"ok"} and len(tried) == 3


def test_a_timeout_that_cannot_be_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    from fluid_npu.cli import main

    assert main(["doctor", "--timeout", "0"]) == 2
    assert "--timeout 0: must be above 0; use --timeout 120" in capsys.readouterr().err

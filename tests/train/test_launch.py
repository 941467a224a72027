"""The launcher's environment and exit codes, and the same command as a rank of torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_npu.train.config import TrainConfig
from fluid_npu.train.launch import rank_environment, run_code, signal_name, usable_cores
from tests.support.training import flags, tiny


@pytest.mark.parametrize(
    ("ended", "stopped", "code"),
    [
        ({0: 0, 1: 0}, [], 0),
        ({0: 4, 1: -9}, [], 4),
        ({0: 4, 1: 1}, [], 1),
        ({0: 2, 1: 2}, [], 2),
        ({0: 3, 1: 4}, [], 3),
        ({0: 4, 1: 4}, [], 4),
        ({0: -15, 1: 1}, [0], 1),
        ({0: 4, 1: -9}, [1], 4),
    ],
)
def test_the_run_ends_with_the_code_of_its_cause(ended: dict[int, int], stopped: list[int], code: int) -> None:
    assert run_code(ended, stopped) == code


def test_ranks_share_the_cores_and_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    env = rank_environment(TrainConfig(nproc=2), 1, 4321)
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_PORT"]) == ("1", "2", "4321")
    assert int(env["OMP_NUM_THREADS"]) == max(1, usable_cores() // 2)
    assert env["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


def test_an_npu_run_loads_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in rank_environment(TrainConfig(device="npu"), 0, 1)


def test_signals_have_names() -> None:
    assert signal_name(9) == "SIGKILL"
    assert signal_name(200) == "signal 200"


def test_it_runs_under_torchrun(tmp_path: Path) -> None:
    words = flags(tiny(tmp_path / "run", steps=3))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "fluid_npu", "train", *words, "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_an_interrupt_within_exec_that_was_handled_does_not_kill_the_process(tmp_path: Path) -> None:
    """As when Ctrl-C comes while torch is imported."""
    code = """
import os, signal, sys
from fluid_npu.train.exit_codes import interrupted
try:
    exec("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)")
except KeyboardInterrupt:
    sys.exit(interrupted())
"""
    (tmp_path / "stopped.py").write_text(code)
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, timeout=250)
    assert done.returncode == 130

"""A process that is not there, fails, dies, hangs or talks rubbish is a problem with a name, never an exception."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fluid_npu.doctor.ask import ask, ask_all, run


@pytest.mark.parametrize(
    "code, problem",
    [
        ("import sys; sys.exit('ImportError: libhccl.so')", "exit code 1: ImportError: libhccl.so"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "no answer within 0.5 s"),
    ],
)
def test_what_went_wrong_is_said(code: str, problem: str) -> None:
    timeout = 0.5 if "sleep" in code else 30
    assert run([sys.executable, "-S", "-c", code], timeout).problem == problem


def test_a_missing_command_and_a_good_one() -> None:
    assert run(["no-such-tool", "info"], 5).problem == "no-such-tool: No such file or directory"
    assert run([sys.executable, "-S", "-c", "print('here')"], 30).output == "here\n"


def plant(folder: Path, name: str, code: str) -> dict[str, str]:
    """An environment in which ``import name`` runs ``code``."""
    (folder / f"{name}.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize(
    "code, problem",
    [
        ("raise ImportError('libtorch_cpu.so: cannot open shared object file')", "ImportError: libtorch_cpu.so"),
        ("raise RuntimeError('driver')", "RuntimeError: driver"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "killed by SIGABRT"),
        ("print('noise'); raise SystemExit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "no answer within 2 s"),
    ],
)
def test_a_broken_torch_is_a_problem(code: str, problem: str, tmp_path: Path) -> None:
    reply = ask("torch", 2 if "sleep" in code else 60, plant(tmp_path, "torch", code))
    assert reply.problem.startswith(problem) and not reply.facts


def test_questions_are_asked_at_the_same_time_each_in_its_environment(tmp_path: Path) -> None:
    broken = plant(tmp_path, "torch", "raise ImportError('no')")
    replies = ask_all({"torch": broken, "no such question": None}, 60)
    assert replies["torch"].problem == "ImportError: no"
    assert replies["no such question"].problem.startswith("KeyError")

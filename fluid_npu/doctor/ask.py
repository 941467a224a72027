"""Asks other processes, and takes no answer for an answer: what dies, hangs or prints rubbish becomes a ``problem``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

#: Facts come on the line that starts so; everything else is noise of the packages that were imported.
MARK = "fluid-npu-facts:"
_KILL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a process answered. ``problem`` is empty when ``output`` (and ``facts``, of a child of ours) can be used."""

    output: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def run(argv: Sequence[str], timeout: float, environ: Mapping[str, str] | None = None) -> Reply:
    """Output of a command. Never raises; a command that is not there, fails or exceeds ``timeout`` s is a problem."""
    # Files, not pipes: a process stuck in a driver survives its kill and would keep a pipe open for ever.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ, start_new_session=True
            )
        except OSError as error:
            return Reply(problem=f"{argv[0]}: {error.strerror}")
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            _kill(process)
            return Reply(problem=f"no answer within {timeout:g} s")
        output, errors = _text(out), _text(err)
    if code:
        return Reply(output=output, problem=f"{_ended(code)}{_last_line(errors or output)}")
    return Reply(output=output)


def ask(question: str, timeout: float, environ: Mapping[str, str] | None = None) -> Reply:
    """The facts that ``fluid_npu.doctor.child`` finds in a process of its own."""
    reply = run([sys.executable, "-m", "fluid_npu.doctor.child", question], timeout, environ)
    if reply.problem:
        return reply
    lines = [line for line in reply.output.splitlines() if line.startswith(MARK)]
    if not lines:
        return Reply(problem="the process ended without an answer")
    try:
        facts = json.loads(lines[-1].removeprefix(MARK))
    except ValueError:
        return Reply(problem="the process gave half an answer")
    return Reply(problem=facts["error"]) if "error" in facts else Reply(facts=facts)


def ask_all(questions: Mapping[str, Mapping[str, str] | None], timeout: float) -> dict[str, Reply]:
    """``ask`` of each question with its environment (None: this one's), at the same time."""
    with ThreadPoolExecutor(max_workers=max(len(questions), 1)) as pool:
        futures = {name: pool.submit(ask, name, timeout, environ) for name, environ in questions.items()}
        return {name: future.result() for name, future in futures.items()}


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_KILL_S)
    except (OSError, subprocess.TimeoutExpired):
        pass  # in uninterruptible sleep: it ends when the driver lets it


def _text(file: Any) -> str:
    file.seek(0)
    content: bytes = file.read()
    return content.decode("utf-8", "replace")


def _ended(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""

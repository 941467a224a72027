"""Runs a job on this machine's processes, or as a rank of torchrun, and returns its result."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fluid_npu.bench.job import Job
from fluid_npu.train import exit_codes
from fluid_npu.train.launch import GRACE_S, Ranks, host_store, rank_environment, run_code, signal_name

_POLL_S = 0.05
# The profiler that measures memory announces itself and blocks older than itself, each time and on every rank.
_QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def run_job(job: Job) -> tuple[int, dict[str, Any] | None]:
    """The exit code and the result; None on failure, and on the ranks of torchrun that are not the first.

    What the ranks print goes to standard error.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_as_rank(job)
    with tempfile.TemporaryDirectory(prefix="fluid-npu-bench-") as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job_path.write_text(job.to_json(), encoding="utf-8")
        code = _run_processes(job, [str(job_path), str(result_path)])
        done = code == exit_codes.OK and result_path.exists()
        return code, json.loads(result_path.read_text(encoding="utf-8")) if done else None


def _run_as_rank(job: Job) -> tuple[int, dict[str, Any] | None]:
    from fluid_npu.bench.worker import run_rank

    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        code, result = run_rank(job)
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
    return code, result if code == exit_codes.OK and os.environ["RANK"] == "0" else None


def _run_processes(job: Job, arguments: list[str]) -> int:
    config, ranks = job.config, Ranks()
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        for rank in range(config.nproc):
            ranks.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "fluid_npu.bench.worker", *arguments],
                    env={**_QUIET, **rank_environment(config, rank, listener.getsockname()[1])},
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                )
            )
        store = host_store(listener)
        code = _watch(job, ranks)
        del store
        return code
    except KeyboardInterrupt:
        print(f"{job.command}: interrupted; stopping the ranks", file=sys.stderr, flush=True)
        return exit_codes.INTERRUPTED
    finally:
        ranks.stop()


def _watch(job: Job, ranks: Ranks) -> int:
    while ranks.running:
        bad = [rank for rank in ranks.poll() if ranks.ended[rank] != exit_codes.OK]
        for rank in bad:
            if ranks.ended[rank] < 0:
                name = signal_name(-ranks.ended[rank])
                print(f"{job.command}: rank {rank} was killed by {name}", file=sys.stderr, flush=True)
        if bad:
            ranks.wait(GRACE_S)
            break
        time.sleep(_POLL_S)
    ranks.stop()
    return run_code(ranks.ended, ranks.stopped)

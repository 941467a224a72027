"""Runs a job on this machine's processes, or as a rank of torchrun, and returns its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from fluid_npu.bench.job import Job
from fluid_npu.link import LinkError, make_network, parse_link
from fluid_npu.link.network import Network
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
    """On the loopback, or behind the slow links that ``options['link']`` asks for."""
    link = job.options.get("link")
    try:
        with make_network(job.config.nproc, parse_link(link) if link else None) as network:
            return _run_in(network, job, arguments)
    except (LinkError, ValueError) as error:
        print(f"{job.command}: {error}", file=sys.stderr, flush=True)
        return exit_codes.USAGE


def _run_in(network: Network, job: Job, arguments: list[str]) -> int:
    ranks = Ranks()
    listener = network.listen()
    try:
        for rank in range(job.config.nproc):
            start = partial(_start, job, arguments, rank, listener.getsockname()[1], network.environment())
            ranks.processes.append(network.in_rank(rank, start))
        store = network.in_hub(lambda: host_store(listener))
        code = _watch(job, ranks)
        del store
        return code
    except KeyboardInterrupt:
        print(f"{job.command}: interrupted; stopping the ranks", file=sys.stderr, flush=True)
        return exit_codes.interrupted()
    finally:
        ranks.stop()


def _start(
    job: Job, arguments: list[str], rank: int, port: int, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "fluid_npu.bench.worker", *arguments],
        env={**_QUIET, **rank_environment(job.config, rank, port), **environment},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )


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

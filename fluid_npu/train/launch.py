"""Starts the ranks of one machine and watches them: one that dies ends the run, none outlives the launcher.

The launcher hosts the TCP store, so it survives any rank. When a rank ends badly the others get ``GRACE_S`` (less
with a short --timeout) to notice by themselves, because they know the collective and the layer; then they are
terminated, then killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluid_npu.train import exit_codes
from fluid_npu.train.config import TrainConfig
from fluid_npu.train.worker import LAUNCHER_PID

CONFIG_FILE = "config.json"
GRACE_S = 10.0
_TERM_S = 3.0
_POLL_S = 0.05


@dataclass
class Ranks:
    """The processes and how those that ended did: rank to exit code, negative for a signal."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)  # by the launcher

    def poll(self) -> list[int]:
        """Ranks that have ended since the last call."""
        fresh = []
        for rank, process in enumerate(self.processes):
            if rank not in self.ended and process.poll() is not None:
                self.ended[rank] = process.returncode
                fresh.append(rank)
        return fresh

    @property
    def running(self) -> list[int]:
        """Ranks that have not ended."""
        return [rank for rank in range(len(self.processes)) if rank not in self.ended]

    def wait(self, seconds: float) -> None:
        """Until all have ended, at most so long."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            self.poll()
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Terminates, then kills what still runs."""
        self.stopped += self.running
        for number, patience in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, 60.0)):
            for rank in self.running:
                self.processes[rank].send_signal(number)
            self.wait(patience)


def write_config(config: TrainConfig) -> None:
    """Leaves the configuration where the ranks read it. Raises OSError."""
    (Path(config.out) / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


def launch(config: TrainConfig, *, quiet_stdout: bool = False) -> int:
    """Runs the training on this machine and returns its exit code.

    Args:
        config: a validated configuration with ``out`` and ``data`` filled in, which ``write_config`` has written.
        quiet_stdout: what the ranks print goes to standard error.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    ranks = Ranks()
    try:
        _start(ranks, config, Path(config.out) / CONFIG_FILE, listener.getsockname()[1], quiet_stdout)
        store = host_store(listener)  # torch is imported while the ranks import theirs
        code = _watch(ranks, config)
        del store
        return code
    except KeyboardInterrupt:
        print("fluid-npu train: interrupted; stopping the ranks", file=sys.stderr, flush=True)
        return exit_codes.interrupted()
    finally:
        ranks.stop()
        _remove_unfinished(config)


def _start(ranks: Ranks, config: TrainConfig, path: Path, port: int, quiet_stdout: bool) -> None:
    for rank in range(config.nproc):
        ranks.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "fluid_npu.train.worker", str(path)],
                env=rank_environment(config, rank, port),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr if quiet_stdout else None,
            )
        )


def rank_environment(config: TrainConfig, rank: int, port: int) -> dict[str, str]:
    """Environment of one rank: as torchrun's, and threads that share the cores."""
    env = dict(os.environ)
    env.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(config.nproc),
        LOCAL_WORLD_SIZE=str(config.nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is the launcher's, rank 0 must not open one
    )
    env[LAUNCHER_PID] = str(os.getpid())
    env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // config.nproc)))
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names of bare machines often do not resolve
    if config.device != "npu":
        env.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    return env


def usable_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def host_store(listener: socket.socket) -> Any:
    """The job's TCP store, listening on the socket; it lives as long as the returned object."""
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    # torch 2.7's libuv server cannot take over a listening socket; the older one can, in every version.
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,
    )


def _watch(ranks: Ranks, config: TrainConfig) -> int:
    while ranks.running:
        bad = [rank for rank in ranks.poll() if ranks.ended[rank] != 0]
        if bad:
            for rank in bad:
                _report(ranks, rank, config)
            ranks.wait(min(GRACE_S, config.timeout + 2))
            _report_late(ranks, bad)
            break
        time.sleep(_POLL_S)
    ranks.stop()
    return run_code(ranks.ended, ranks.stopped)


def _report(ranks: Ranks, rank: int, config: TrainConfig) -> None:
    code = ranks.ended[rank]
    if code < 0:
        pid = ranks.processes[rank].pid
        print(
            f"fluid-npu train: rank {rank} (pid {pid}) was killed by {signal_name(-code)}; the others stop. "
            f"Continue with: fluid-npu train ... --out {config.out} --resume",
            file=sys.stderr,
            flush=True,
        )


def _report_late(ranks: Ranks, known: list[int]) -> None:
    for rank, code in ranks.ended.items():
        if rank not in known and code < 0:
            print(f"fluid-npu train: rank {rank} was killed by {signal_name(-code)}", file=sys.stderr, flush=True)
    if ranks.running:
        names = ", ".join(map(str, ranks.running))
        print(f"fluid-npu train: rank {names} did not stop by itself and is terminated", file=sys.stderr, flush=True)


def run_code(ended: dict[int, int], stopped: list[int]) -> int:
    """Exit code of the run: a killed rank counts most, then a rank's own error, then its lost peers."""
    codes = [code for rank, code in sorted(ended.items()) if rank not in stopped]
    if any(code < 0 for code in codes):
        return exit_codes.RANK_LOST
    own = [code for code in codes if code not in (exit_codes.OK, exit_codes.RANK_LOST)]
    if own:
        return own[0]
    return exit_codes.RANK_LOST if stopped or exit_codes.RANK_LOST in codes else exit_codes.OK


def signal_name(number: int) -> str:
    """'SIGKILL' for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _remove_unfinished(config: TrainConfig) -> None:
    """Takes away the checkpoint that was being written when the run ended badly."""
    import shutil

    from fluid_npu.train.checkpoint_files import folder_of

    for work in folder_of(config.out).glob("step_*.tmp"):
        shutil.rmtree(work, ignore_errors=True)

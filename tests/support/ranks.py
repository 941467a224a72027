"""Runs a function on several processes joined by gloo, or HCCL with ``--device npu``: ``run_ranks(2, function, ...)``.

Processes are forked from a server that has imported Megatron once, so a call costs a fraction of a second
after the first one (about 6 s), and every call still gets fresh processes. ``function`` must be at module
level; its result travels back by pickle. Several unrelated checks belong in one function only where they
share an expensive set-up.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support import device

_ROOT = Path(__file__).resolve().parents[2]
_PRELOAD = [
    "torch",
    "torch.distributed",
    "numpy",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    *device.PRELOAD,
    "tests.support.parsed",
]
#: faulthandler writes the main thread last, and of it the outermost frame.
_STACK_END = "in <module>\n"


class RankError(AssertionError):
    """A rank failed, died or did not return in time; the message holds every rank's traceback."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a child process needs to know."""

    path: str  # of the function's source file; empty: import the module by name
    module: str
    name: str
    payload: bytes  # (args, kwargs)
    store: str
    sizes: dict[str, Any] | None
    seed: int
    timeout: float
    env: dict[str, str] = field(default_factory=dict)


def run_ranks(
    nproc: int,
    function: Callable[..., Any] | str,
    *args: Any,
    sizes: dict[str, Any] | None = None,
    seed: int = 1234,
    timeout: float = 240.0,
    grace: float = 2.0,
    env: dict[str, str] | None = None,
    start: str = "forkserver",
    **kwargs: Any,
) -> list[Any]:
    """Calls ``function(*args, **kwargs)`` on ``nproc`` fresh processes of one process group.

    Args:
        nproc: number of processes, each with RANK, LOCAL_RANK and WORLD_SIZE; on NPUs one of its own for each.
        function: a module-level function, or ``'module.path:function'``.
        sizes: arguments of ``parallel_state.initialize_model_parallel``, such as
            ``{"expert_model_parallel_size": 2}``; with it (``{}`` too) ``adapt`` for the device and Megatron's
            random states are set up first. None: torch.distributed only.
        seed: of Megatron's random states and of torch.
        timeout: seconds for everything; stuck ranks are killed and their stacks shown.
        grace: seconds after the first failure in which other ranks may answer too; tests of what those say give more.
        env: extra environment of the children.
        start: how processes begin. 'spawn' for CUDA: what the server has imported may have asked for GPUs.

    Returns:
        The results in rank order, their tensors on the CPU.

    Raises:
        RankError: with the traceback of the rank that failed first, then of the others.
    """
    context: Any = mp.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = _make_job(function, (args, kwargs), f"{folder}/store", sizes, seed, timeout, env or {})
        pipes, processes = [], []
        for rank in range(nproc):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(job, rank, nproc, send, f"{folder}/stack{rank}"), daemon=False
            )
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        try:
            return _collect(pipes, processes, folder, timeout, grace)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _make_job(function: Any, call: Any, store: str, sizes: Any, seed: int, timeout: float, env: dict[str, str]) -> _Job:
    if isinstance(function, str):
        module, _, name = function.partition(":")
        path = ""
    else:
        module, name = function.__module__, function.__qualname__
        path = inspect.getsourcefile(function) or ""
    if "<" in name:
        raise ValueError(f"run_ranks: {name!r} is local; move it to module level so that children can import it")
    return _Job(
        path=path,
        module=module,
        name=name,
        payload=pickle.dumps(call),
        store=store,
        sizes=sizes,
        seed=seed,
        timeout=timeout,
        env=env,
    )


def _collect(pipes: list[Connection], processes: list[Any], folder: str, timeout: float, grace: float) -> list[Any]:
    """Waits for one answer of each rank; after the first failure the others have ``grace`` seconds."""
    results: dict[int, Any] = {}
    failures: list[tuple[float, str]] = []
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), timeout=left):
            rank = waiting.pop(pipe)  # type: ignore[index]
            try:
                good, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                processes[rank].join(20)
                # Who dies is the cause of what others say.
                good, value = False, (0.0, f"died without an answer, exit code {processes[rank].exitcode}")
            if good:
                results[rank] = value
            else:
                failures.append((value[0], f"--- rank {rank}: {value[1]}"))
                deadline = min(deadline, time.monotonic() + grace)
    if failures or waiting:
        # By the ranks' own clock: who looks late finds several answers, and in the order of the ranks.
        texts = [text for _, text in sorted(failures)]
        texts += [_stuck(rank, processes[rank], folder, timeout) for rank in waiting.values()]
        raise RankError("\n".join(texts))
    return [results[rank] for rank in range(len(pipes))]


def _stuck(rank: int, process: Any, folder: str, timeout: float) -> str:
    """The stack of a rank that did not answer."""
    stack, text, end = Path(f"{folder}/stack{rank}"), "", time.monotonic() + 10
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1)
    while not text.endswith(_STACK_END) and time.monotonic() < end:
        alive = process.is_alive()
        text = stack.read_text() if stack.exists() else ""
        if not alive:
            break
        time.sleep(0.05)
    return f"--- rank {rank}: no answer (timeout={timeout:.0f} s, or stopped because another rank failed)\n{text}"


def _child(job: _Job, rank: int, nproc: int, pipe: Connection, stack: str) -> None:
    """Body of one process."""
    with open(stack, "w") as out:
        faulthandler.register(signal.SIGUSR1, file=out, all_threads=True)
        os.environ.update(job.env, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc))
        try:
            answer = pickle.dumps((True, device.host(_run(job, rank, nproc))))
        except BaseException:
            answer = pickle.dumps((False, (time.monotonic(), traceback.format_exc())))
        for helper in mp.active_children():  # Megatron's checkpoint writer leaves a manager, which would stay
            helper.terminate()
        pipe.send_bytes(answer)  # the last thing: who started the ranks kills them when it has all answers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the process group must not delay the exit


def _run(job: _Job, rank: int, nproc: int) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    mine = device.device()
    mine.set_current(rank)
    store = dist.FileStore(job.store, nproc)
    limit = timedelta(seconds=job.timeout)
    dist.init_process_group(mine.backend, store=store, rank=rank, world_size=nproc, timeout=limit)
    if job.sizes is not None:
        _init_megatron(job.sizes, job.seed)
    args, kwargs = _load_payload(job)
    function: Any = _load_module(job)
    for part in job.name.split("."):
        function = getattr(function, part)
    result = function(*args, **kwargs)
    dist.barrier()  # nobody leaves while a peer still communicates
    return result


def _init_megatron(sizes: dict[str, Any], seed: int) -> None:
    device.adapt()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(seed)


def _load_module(job: _Job) -> Any:
    """The function's module, by path: test folders are no packages."""
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
    if not job.path:
        return importlib.import_module(job.module)
    if job.module in sys.modules and job.module != "__main__":
        return sys.modules[job.module]
    name = "rank_main" if job.module == "__main__" else job.module
    spec = importlib.util.spec_from_file_location(name, job.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[job.module] = sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _load_payload(job: _Job) -> Any:
    _load_module(job)  # arguments may be instances of its classes
    return pickle.loads(job.payload)

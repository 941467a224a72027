"""One rank of a bench: ``python -m fluid_npu.bench.worker JOB.json RESULT.json``, or a rank of torchrun."""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from fluid_npu.bench.job import Job
from fluid_npu.train import exit_codes
from fluid_npu.train.worker import follow_launcher


def run_rank(job: Job) -> tuple[int, dict[str, Any]]:
    """Runs the job as the rank that the environment describes; the exit code, and the result (complete on rank 0)."""
    from fluid_npu.bench.agreement import Disagreement
    from fluid_npu.comm.guard import CollectiveError, is_communication
    from fluid_npu.device import DeviceUnavailable
    from fluid_npu.train.config import ConfigError

    try:
        return exit_codes.OK, _run(job)
    except Disagreement as error:
        return _fail(job, str(error), exit_codes.FAILED, everywhere=False)
    except (ConfigError, DeviceUnavailable) as error:
        return _fail(job, str(error), exit_codes.USAGE, everywhere=False)
    except CollectiveError as error:
        return _fail(job, str(error), exit_codes.RANK_LOST)
    except Exception as error:
        if is_communication(error):
            return _fail(job, f"{type(error).__name__}: {error}", exit_codes.RANK_LOST)
        return _fail(job, traceback.format_exc(), exit_codes.FAILED)


def _run(job: Job) -> dict[str, Any]:
    import torch

    from fluid_npu.train.parallel import join, leave
    from fluid_npu.train.quiet import hush_known_warnings

    hush_known_warnings()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    module, _, name = job.task.partition(":")
    # Before join: once torch.cuda means the NPU, torch.compile cannot decorate the functions of Megatron's modules.
    task = getattr(import_module(module), name)
    place = join(job.config)
    result: dict[str, Any] = task(job.config, job.options, place)
    leave(place)
    return result


def _fail(job: Job, text: str, code: int, *, everywhere: bool = True) -> tuple[int, dict[str, Any]]:
    rank = os.environ.get("RANK", "0")
    if everywhere or rank == "0":
        print(f"{job.command}: {f'rank {rank}: ' if everywhere else ''}{text}", file=sys.stderr, flush=True)
    return code, {}


def main(job_path: str, result_path: str) -> int:
    """Body of a process that the launcher started; rank 0 writes the result."""
    follow_launcher()
    code, result = run_rank(Job.from_json(Path(job_path).read_text(encoding="utf-8")))
    if code == exit_codes.OK and os.environ["RANK"] == "0":
        Path(result_path).write_text(json.dumps(result), encoding="utf-8")
    return code


if __name__ == "__main__":
    exit_code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # threads of a broken process group must not delay the exit

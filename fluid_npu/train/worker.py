"""One rank: ``python -m fluid_npu.train.worker CONFIG.json``, started by the launcher or by torchrun.

The module's top level imports nothing heavy: helper processes of other libraries import it again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback

from fluid_npu.train import exit_codes

LAUNCHER_PID = "FLUID_NPU_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1


def main(path: str) -> int:
    """Runs the rank to its end; returns the exit code."""
    follow_launcher()
    from fluid_npu.train.config import TrainConfig
    from fluid_npu.train.quiet import hush_known_warnings

    hush_known_warnings()

    return run_rank(TrainConfig.load(path))


def run_rank(config: object) -> int:
    """Trains as the rank that the environment describes. Every failure is one line; bugs show a traceback."""
    from fluid_npu.comm.guard import CollectiveError, is_communication, one_line
    from fluid_npu.device import DeviceUnavailable
    from fluid_npu.train.checkpoint_files import CheckpointError
    from fluid_npu.train.config import ConfigError, TrainConfig
    from fluid_npu.train.data.errors import DataError
    from fluid_npu.train.presets import PresetError

    assert isinstance(config, TrainConfig)
    try:
        _train(config)
        return exit_codes.OK
    except CollectiveError as error:
        return _fail(str(error), exit_codes.RANK_LOST)
    except (ConfigError, PresetError, DeviceUnavailable) as error:
        return _fail(str(error), exit_codes.USAGE, everywhere=False)
    except DataError as error:
        return _fail(str(error), exit_codes.DATA, everywhere=False)
    except CheckpointError as error:
        return _fail(str(error), exit_codes.FAILED, everywhere=False)
    except KeyboardInterrupt:
        return exit_codes.interrupted()
    except OSError as error:
        return _fail(f"--out: cannot be written ({error}); free some space or choose another", exit_codes.FAILED)
    except Exception as error:
        if is_communication(error):
            return _fail(f"{type(error).__name__}: {one_line(str(error))}; {_blame()}", exit_codes.RANK_LOST)
        return _fail(_explain(error), exit_codes.FAILED)


def _train(config: object) -> None:
    import torch

    from fluid_npu.train.loop import train
    from fluid_npu.train.parallel import join, leave

    # OMP_NUM_THREADS was set by the launcher; torchrun sets it to 1.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    place = join(config)  # type: ignore[arg-type]
    train(config, place)  # type: ignore[arg-type]
    leave(place)


def _blame() -> str:
    """Which ranks are silent: an NPU tells of a lost peer at its next synchronisation, outside the collective."""
    from fluid_npu.comm.guard import watch

    me, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return watch.blame([rank for rank in range(world) if rank != me])


def _explain(error: Exception) -> str:
    from fluid_npu.train.step import TrainingDiverged

    return str(error) if isinstance(error, TrainingDiverged) else traceback.format_exc()


def _fail(text: str, code: int, *, everywhere: bool = True) -> int:
    """Prints the reason; one that all ranks share is printed by rank 0 alone."""
    rank = os.environ.get("RANK", "0")
    if everywhere or rank == "0":
        prefix = "" if text.startswith("rank ") else f"rank {rank}: "
        print(f"fluid-npu train: {prefix}{text}", file=sys.stderr, flush=True)
    return code


def follow_launcher() -> None:
    """Dies with the launcher; leaves Ctrl-C to it."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the line above
        os._exit(exit_codes.RANK_LOST)


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():  # Megatron's checkpoint writer leaves a manager, which would stay
        child.terminate()
    os._exit(code)  # threads of a broken process group must not delay the exit

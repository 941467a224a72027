"""Runs a command on the simulator: the same command, in an environment where torch_npu finds our libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fluid_npu.sim.build import build
from fluid_npu.sim.environment import prepare_packages
from fluid_npu.sim.errors import SimError

# Chips that a user knows, and the names that CANN gives them.
SOCS = {"910B": "Ascend910B3", "910C": "Ascend910_9392"}


def simulator_environment(base: Mapping[str, str], packages: Path, library: Path) -> dict[str, str]:
    """``base`` with what a process needs to find torch_npu and the simulated CANN."""
    env = dict(base)
    env["LD_LIBRARY_PATH"] = _joined(library, env.get("LD_LIBRARY_PATH"))
    env["PYTHONPATH"] = _joined(packages, env.get("PYTHONPATH"))
    env["PATH"] = _joined(Path(sys.executable).parent, env.get("PATH"))
    env["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch must not import torch_npu by itself
    env["FLUID_SIM"] = "1"
    return env


def _joined(first: Path, rest: str | None) -> str:
    return os.pathsep.join([str(first), rest] if rest else [str(first)])


def settings(
    *,
    soc: str = "910B",
    devices: int | None = None,
    hbm_mb: int | None = None,
    delay_seed: int | None = None,
    delay_us: int | None = None,
    log: str | None = None,
    order: str | None = None,
    allow_fallback: bool = False,
) -> dict[str, str]:
    """The simulator's own variables. Raises SimError for a value that cannot be."""
    if soc not in SOCS:
        raise SimError(f"--soc {soc!r}: allowed are {', '.join(SOCS)}")
    chosen = {"FLUID_SIM_SOC": SOCS[soc]}
    numbers = {"devices": (devices, 1), "hbm_mb": (hbm_mb, 1), "delay_seed": (delay_seed, 0), "delay_us": (delay_us, 1)}
    for name, (value, least) in numbers.items():
        if value is None:
            continue
        if value < least:
            raise SimError(f"--{name.replace('_', '-')} {value}: it must be {least} or more")
        chosen[f"FLUID_SIM_{name.upper()}"] = str(value)
    for name, given in (("LOG", log), ("ORDER", order)):
        if given is not None:
            folder = Path(given).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            chosen[f"FLUID_SIM_{name}"] = str(folder)
    if order is not None:
        # Without torch_npu's queue of launches every call comes from the thread whose Python line submits it.
        chosen["TASK_QUEUE_ENABLE"] = "0"
    if allow_fallback:
        chosen["FLUID_SIM_FALLBACK"] = "allow"
    return chosen


def execute(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Builds the simulator if need be and becomes the command. Returns never; raises SimError."""
    if not command:
        raise SimError("sim exec: no command; write it behind --, as in: fluid-npu sim exec -- python train.py")
    library = build()
    env = {**simulator_environment(os.environ, prepare_packages(), library), **variables}
    sys.stdout.flush()
    try:
        os.execvpe(command[0], list(command), env)
    except OSError as error:
        raise SimError(f"sim exec: {command[0]} cannot be run ({error.strerror})") from error

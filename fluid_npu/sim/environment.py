"""Where the simulator lives and what it needs: a cache folder, g++, torch, and torch-npu in a folder of its own.

torch-npu is never installed beside torch: without CANN it would make a plain ``import torch`` fail. It is put into the
cache with ``pip install --target`` and only the simulator's child processes have that folder on their path, so torch
itself is not installed twice.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from fluid_npu.sim.errors import SimError

TORCH_NPU = "2.13.0"
_TORCH = "2.13.0"  # what that torch-npu is built for


def home() -> Path:
    """The simulator's cache: FLUID_SIM_HOME, else ``fluid-npu/sim`` in the user's cache folder."""
    chosen = os.environ.get("FLUID_SIM_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "fluid-npu" / "sim"


def torch_folder() -> Path:
    """The installed torch package, found without importing it. Raises SimError for a missing or another version."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SimError(f"torch is not installed; pip install torch=={_TORCH}")
    version = metadata.version("torch")
    if version.split("+")[0] != _TORCH:
        raise SimError(
            f"the simulator runs torch-npu {TORCH_NPU}, which is built for torch {_TORCH}, and torch {version} is "
            f"installed; use an environment with torch=={_TORCH}"
        )
    return Path(spec.origin).parent


def check_machine() -> None:
    """Raises SimError, with the fix, where the simulator cannot work."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SimError(
            f"torch-npu has wheels for Linux on x86_64 and aarch64, this is {sys.platform} on "
            f"{platform.machine()}; use a container or a virtual machine"
        )
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise SimError(f"Python {platform.python_version()}: use Python 3.10, 3.11 or 3.12")
    torch_folder()
    compiler()


def compiler() -> str:
    """The C++ compiler: CXX, else g++. Raises SimError when it is not there."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise SimError(
            f"the simulator is compiled on first use and there is no {name}; install it (Debian, Ubuntu: apt install "
            "g++; openEuler, RHEL: dnf install gcc-c++) or set CXX to a C++20 compiler"
        )
    return found


def packages_folder() -> Path:
    """Where torch-npu is, or will be, for this Python."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return home() / f"torch_npu-{TORCH_NPU}-{tag}-{platform.machine()}"


def prepare_packages() -> Path:
    """The folder with torch-npu in it, installed if it is not there. Raises SimError."""
    folder = packages_folder()
    if (folder / "torch_npu" / "lib").is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="install-") as work:
        target = Path(work) / "packages"
        _pip_install(target)
        try:
            target.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "torch_npu" / "lib").is_dir():
                raise
    return folder


def _pip_install(target: Path) -> None:
    """torch-npu, and PyYAML where it is missing, without their dependencies: torch and numpy are installed already."""
    wanted = [os.environ.get("FLUID_SIM_WHEEL") or f"torch-npu=={TORCH_NPU}"]
    if find_spec("yaml") is None:
        wanted.append("pyyaml")
    print(
        f"fluid-npu sim: installing {' '.join(wanted)} (44 MB) into {target.parent.parent}", file=sys.stderr, flush=True
    )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--no-deps", "--only-binary", ":all:", "--target", str(target), *wanted],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SimError(
            f"pip could not install {' '.join(wanted)}: {_last_lines(done.stderr)}\nWithout a network, fetch the wheel "
            f"elsewhere (pip download --no-deps torch-npu=={TORCH_NPU}) and set FLUID_SIM_WHEEL to its path"
        )


def _last_lines(text: str, count: int = 3) -> str:
    return "; ".join(line for line in text.strip().splitlines()[-count:] if line)

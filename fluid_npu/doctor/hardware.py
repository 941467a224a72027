"""Hardware and drivers, found and not found: CPU, CUDA, Ascend NPU with its driver, CANN and torch_npu."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fluid_npu.doctor.ask import Reply
from fluid_npu.doctor.finding import Item

ReadText = Callable[[str], str | None]

#: CANN's set_env.sh exports these; the first is the newer name.
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_HOME")
_CANN_DEFAULT = "/usr/local/Ascend/ascend-toolkit/latest"
_CANN_FILES = ("version.cfg", "version.info", "compiler/version.info", "runtime/version.info")
_DRIVER_FILE = "/usr/local/Ascend/driver/version.info"
_SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"


def read_text(path: str) -> str | None:
    """The text of a file; None where there is none that can be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def cpu_item(processor: str, cores: int, memory_gib: float) -> Item:
    """The processor; ``cores`` are those that this process may use."""
    text = f"{processor}, {cores} cores usable, {memory_gib:.0f} GiB"
    if cores < 2:
        return Item(
            name="CPU", level="note", text=f"{text}: gloo's thread has no core of its own, nothing can be hidden on it"
        )
    return Item(name="CPU", level="ok", text=text)


def cuda_items(torch: Reply, nvidia_smi: Reply) -> list[Item]:
    """The driver by ``nvidia-smi --query-gpu=name,driver_version`` and the GPUs that torch sees."""
    drivers = [line.strip() for line in nvidia_smi.output.splitlines() if line.strip()]
    driver = f"{len(drivers)} x {drivers[0]}" if drivers and not nvidia_smi.problem else ""
    items = [_driver_item("NVIDIA driver", driver, nvidia_smi.problem)]
    if torch.problem:
        return items
    gpus, build = torch.facts["gpus"], torch.facts["cuda_build"]
    if gpus:
        names = f"{len(gpus)} x {gpus[0]['name']}, {gpus[0]['gib']:.0f} GiB"
        low = gpus[0]["capability"] < 8
        text = f"torch sees {names}; NCCL {torch.facts['nccl_version'] or 'missing'}"
        if low:
            text += "; compute capability below 8, which Megatron's --moe-grouped-gemm refuses"
        return [*items, Item(name="CUDA", level="warn" if low else "ok", text=text)]
    reason = "this torch is built without CUDA" if build is None else "torch sees no GPU"
    if driver:
        fix = "check CUDA_VISIBLE_DEVICES and that the driver fits torch's CUDA version"
        if build is None:
            fix = "pip install a CUDA build of torch (https://pytorch.org/get-started)"
        return [*items, Item(name="CUDA", level="wrong", text=f"{reason}, though nvidia-smi lists some", fix=fix)]
    return [*items, Item(name="CUDA", level="note", text=f"none: {reason}")]


def _driver_item(name: str, found: str, problem: str) -> Item:
    if found:
        return Item(name=name, level="ok", text=found)
    if "No such file" in problem:
        return Item(name=name, level="note", text=f"none: {problem.split(':')[0]} is not on PATH")
    return Item(name=name, level="warn", text=problem, fix="ask the machine's owner: the driver does not answer")


def npu_items(
    devices: Sequence[str], npu_smi: Reply, environ: Mapping[str, str], npu: Reply | None, read: ReadText = read_text
) -> list[Item]:
    """The four layers of an NPU, lowest first.

    ``devices``: names in /dev; ``npu_smi``: of ``npu-smi info``; ``npu``: None where torch_npu is not installed.
    """
    chips = sorted(name for name in devices if re.fullmatch(r"davinci\d+", name))
    return [
        _devices_item(chips),
        _npu_driver_item(chips, npu_smi, read),
        cann_item(environ, read, needed=bool(chips)),
        torch_npu_item(npu, needed=bool(chips)),
    ]


def _devices_item(chips: Sequence[str]) -> Item:
    if chips:
        return Item(name="NPU devices", level="ok", text=f"{len(chips)}: /dev/{chips[0]} to /dev/{chips[-1]}")
    return Item(name="NPU devices", level="note", text="none: no /dev/davinci*")


def _npu_driver_item(chips: Sequence[str], npu_smi: Reply, read: ReadText) -> Item:
    version = _version_in(read(_DRIVER_FILE))
    known = f"; driver {version}" if version else ""
    if not npu_smi.problem:
        return Item(name="npu-smi", level="ok", text=f"answers{known}")
    if "No such file" in npu_smi.problem and not chips:
        return Item(name="npu-smi", level="note", text="none: npu-smi is not on PATH")
    fix = "install the driver, or start the container with /usr/local/Ascend/driver and /usr/local/bin/npu-smi mounted"
    return Item(name="npu-smi", level="wrong" if chips else "warn", text=f"{npu_smi.problem}{known}", fix=fix)


def cann_item(environ: Mapping[str, str], read: ReadText = read_text, *, needed: bool = False) -> Item:
    """Where CANN is, whether its set_env.sh was sourced, and its version."""
    variable = next((name for name in CANN_VARIABLES if environ.get(name)), None)
    home = environ[variable] if variable else _CANN_DEFAULT
    version = next(filter(None, (_version_in(read(f"{home}/{name}")) for name in _CANN_FILES)), None)
    if variable and version:
        return Item(name="CANN", level="ok", text=f"{version} at {variable}={home}{_atb(environ)}")
    if variable:
        text = f"{variable}={home} has no version.cfg or version.info"
        return Item(name="CANN", level="wrong" if needed else "warn", text=text, fix=f"install CANN, then {_SET_ENV}")
    if version:
        return Item(
            name="CANN", level="wrong", text=f"{version} is installed and set_env.sh is not sourced", fix=_SET_ENV
        )
    level, fix = ("wrong", f"install CANN, then {_SET_ENV}") if needed else ("note", "")
    return Item(name="CANN", level=level, text=f"none: {' and '.join(CANN_VARIABLES[:2])} are not set", fix=fix)


def _atb(environ: Mapping[str, str]) -> str:
    return "" if environ.get("ATB_HOME_PATH") else "; ATB_HOME_PATH is not set (MindSpeed's npu_groupmatmul_add_fp32)"


def torch_npu_item(npu: Reply | None, *, needed: bool = False) -> Item:
    """Whether torch_npu imports and sees NPUs; ``npu`` is None where it is not installed."""
    if npu is None:
        level, fix = ("wrong", "pip install 'fluid-npu[npu]'") if needed else ("note", "")
        return Item(name="torch_npu", level=level, text="none: not installed", fix=fix)
    if npu.problem:
        fix = "a torch_npu that fits torch, and CANN's set_env.sh; or uninstall it"
        return Item(name="torch_npu", level="wrong", text=f"import failed: {npu.problem}", fix=fix)
    if not npu.facts["usable"]:
        fix = f"{_SET_ENV}; check npu-smi info" if needed else "uninstall torch-npu on a machine without NPUs"
        return Item(name="torch_npu", level="wrong" if needed else "warn", text=npu.facts["reason"], fix=fix)
    return Item(name="torch_npu", level="ok", text=npu.facts["description"])


def _version_in(text: str | None) -> str | None:
    match = re.search(r"\d+\.\d+[\w.]*", text or "")
    return match[0] if match else None

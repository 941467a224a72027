"""Gathers the facts of this machine and hands them to the checks. The only module here that looks around by itself."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fluid_npu.adaptor.dtypes import supported_lines
from fluid_npu.doctor.advice import next_steps
from fluid_npu.doctor.ask import Reply, ask_all, run
from fluid_npu.doctor.environment import environment_items
from fluid_npu.doctor.finding import Item, Section
from fluid_npu.doctor.hardware import cpu_item, cuda_items, npu_items, read_text
from fluid_npu.doctor.megatrons import Portion, find_portions, here_item, imported_core, megatron_items
from fluid_npu.doctor.packages import installed_version, package_items
from fluid_npu.doctor.patches import patch_items
from fluid_npu.doctor.readiness import Readiness, overlap_readiness, readiness_item
from fluid_npu.doctor.report import Report
from fluid_npu.doctor.substitutes import substitute_items

_SMI = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def examine(environ: Mapping[str, str], path: Sequence[str], timeout: float, tool_timeout: float) -> Report:
    """The whole report. ``timeout``: seconds for each child process, ``tool_timeout``: for nvidia-smi and npu-smi."""
    # Broken or not, torch_npu must not decide whether torch can be looked at.
    plain = {**environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    questions: dict[str, Mapping[str, str] | None] = {"torch": plain, "substitutes": plain, "patches": plain}
    if installed_version("torch-npu") is not None:
        questions["npu"] = plain
    replies = ask_all(questions, timeout)
    cores = _usable_cores()
    readiness = _readiness(replies, environ, cores)
    portions = find_portions(path)
    sections = (
        _hardware(replies, environ, cores, tool_timeout),
        Section(name="packages", title="Packages", items=tuple(_packages(replies["torch"], portions))),
        Section(name="megatron", title="Megatron on the path", items=tuple(_megatrons(environ, portions))),
        Section(
            name="substitutes",
            title="Transformer Engine, apex, MindSpeed",
            items=tuple(substitute_items(replies["substitutes"])),
        ),
        Section(
            name="environment", title="Environment variables", items=tuple(environment_items(environ, cores=cores))
        ),
        Section(
            name="patches", title="Patches for the installed versions", items=tuple(patch_items(replies["patches"]))
        ),
        Section(name="overlap", title="Can an AllToAll be hidden here?", items=(readiness_item(readiness),)),
    )
    return Report(sections=sections, overlap=readiness, next=tuple(next_steps(sections, readiness)))


def _hardware(replies: Mapping[str, Reply], environ: Mapping[str, str], cores: int, timeout: float) -> Section:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = os.listdir("/dev") if Path("/dev").is_dir() else []
    items: list[Item] = [
        cpu_item(_processor(read_text("/proc/cpuinfo")), cores, memory),
        *cuda_items(replies["torch"], run(_SMI, timeout)),
        *npu_items(devices, run(("npu-smi", "info"), timeout), environ, replies.get("npu")),
    ]
    return Section(name="hardware", title="Hardware and drivers", items=tuple(items))


def _packages(torch: Reply, portions: Sequence[Portion]) -> list[Item]:
    imported = imported_core(portions)

    def version_of(project: str) -> str | None:
        shadows = project == "megatron-core" and imported is not None
        return imported if shadows else installed_version(project)

    return package_items(sys.version_info[:2], version_of, supported_lines(), torch.problem)


def _megatrons(environ: Mapping[str, str], portions: Sequence[Portion]) -> list[Item]:
    given = {str(Path(entry).resolve()) for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    here = find_portions([os.curdir])
    items = megatron_items(portions, installed_version("megatron-core"), given.__contains__)
    return [*items, *here_item(here[0] if here else None, portions)]


def _readiness(replies: Mapping[str, Reply], environ: Mapping[str, str], cores: int) -> Readiness:
    """For the device that ``--device auto`` would take."""
    npu = replies.get("npu")
    if npu is not None and not npu.problem and npu.facts["usable"]:
        return overlap_readiness("npu", npu.facts["count"], environ)
    gpus = 0 if replies["torch"].problem else len(replies["torch"].facts["gpus"])
    return overlap_readiness("cuda", gpus, environ) if gpus else overlap_readiness("cpu", 1, environ, cores)


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor(cpuinfo: str | None) -> str:
    models = [line for line in (cpuinfo or "").splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()

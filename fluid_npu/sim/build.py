"""Compiles the simulator's libraries once: the folder's name is a key of the sources and of the versions it is built for."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from fluid_npu.sim import audit, sources
from fluid_npu.sim.environment import TORCH_NPU, check_machine, compiler, home, prepare_packages, torch_folder
from fluid_npu.sim.errors import SimError

_JOBS = 2
_DONE = "complete"


def library_folder() -> Path:
    """Where the libraries for this environment are, or will be."""
    return home() / f"lib-{_key()}"


def is_built() -> bool:
    """Whether the libraries are there."""
    return (library_folder() / _DONE).is_file()


def build(*, force: bool = False) -> Path:
    """The folder with the libraries, compiled if they are not there. Raises SimError."""
    check_machine()
    out = library_folder()
    if is_built() and not force:
        return out
    torch_npu = prepare_packages() / "torch_npu"
    home().mkdir(parents=True, exist_ok=True)
    with _lock(home() / "lock"):
        if is_built() and not force:  # by the process that held the lock
            return out
        start = time.monotonic()
        print(f"fluid-npu sim: compiling the simulator into {out}", file=sys.stderr, flush=True)
        shutil.rmtree(out, ignore_errors=True)
        _compile_all(out, torch_folder(), torch_npu)
        (out / _DONE).write_text(f"{time.monotonic() - start:.0f} s\n", encoding="utf-8")
        print(f"fluid-npu sim: compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return out


def _key() -> str:
    digest = hashlib.sha256()
    for path in [*sources.all_files(), Path(sources.__file__), Path(audit.__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout.splitlines()[:1]
    digest.update(repr((metadata.version("torch"), TORCH_NPU, version, sys.version_info[:2])).encode())
    return digest.hexdigest()[:12]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One build at a time: tests and ranks may all ask for it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile_all(out: Path, torch: Path, torch_npu: Path) -> None:
    objects = out / "objects"
    objects.mkdir(parents=True)
    includes = sources.include_flags(torch, torch_npu)
    work = [(library, source) for library in sources.LIBRARIES for source in library.sources()]
    work.sort(key=lambda item: not item[0].torch)  # the slow ones first
    with ThreadPoolExecutor(_JOBS) as pool:
        absent = pool.submit(_absent_names, torch, torch_npu)
        list(pool.map(lambda item: _compile(item[1], _object_of(objects, *item), includes), work))
        stubs = objects / "stubs.c"
        runtime = [_object_of(objects, *item) for item in work if item[0].name == "libascendcl.so"]
        stubs.write_text(audit.stubs(absent.result() - _defined(runtime)), encoding="utf-8")
    _compile(stubs, objects / "stubs.o", ["-x", "c"])
    for library in sources.LIBRARIES:
        parts = [_object_of(objects, library, source) for source in library.sources()]
        if library.name == "libascendcl.so":
            parts.append(objects / "stubs.o")
        _run(*parts, "-o", out / library.name, *sources.link_flags(library, torch, out))
    for name in sources.EMPTY:
        _run("-shared", f"-Wl,-soname,{name}", "-x", "c", os.devnull, "-o", out / name)
    shutil.rmtree(objects)


def _absent_names(torch: Path, torch_npu: Path) -> set[str]:
    return audit.imported_names(torch, torch_npu)


def _defined(objects: list[Path]) -> set[str]:
    done = subprocess.run(["nm", "--defined-only", *map(str, objects)], capture_output=True, text=True)
    return {line.split()[-1] for line in done.stdout.splitlines() if line.split()}


def _object_of(folder: Path, library: sources.Library, source: Path) -> Path:
    return folder / f"{library.name}-{source.stem}.o"


def _compile(source: Path, target: Path, flags: list[str]) -> None:
    language = [] if source.suffix == ".c" else list(sources.COMPILE)
    _run(*language, *flags, "-fPIC", "-O1", "-w", "-c", source, "-o", target)


def _run(*arguments: object) -> None:
    command = [compiler(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SimError(f"{' '.join(command)}\n{done.stderr[-3000:]}\nIs {compiler()} a C++20 compiler (g++ 11 or later)?")

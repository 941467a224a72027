"""Compiles the simulator's libraries once: their folder's name is a key of the sources and of the versions used.

Objects are kept by a key of their own, so that a change of one source compiles that one again.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
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
        if force:
            shutil.rmtree(home() / "objects", ignore_errors=True)
        _compile_all(out, torch_folder(), torch_npu)
        (out / _DONE).write_text(f"{time.monotonic() - start:.0f} s\n", encoding="utf-8")
        print(f"fluid-npu sim: compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return out


def _key() -> str:
    files = [*sources.all_files(), Path(sources.__file__), Path(audit.__file__)]
    return _digest(files)


def _digest(files: Iterable[Path], *more: object) -> str:
    """Of the files' contents and of all that decides what the compiler makes of them."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(
        repr((metadata.version("torch"), TORCH_NPU, _compiler_version(), sys.version_info[:2], more)).encode()
    )
    return digest.hexdigest()[:12]


@functools.cache
def _compiler_version() -> str:
    done = subprocess.run([compiler(), "--version"], capture_output=True, text=True)
    return done.stdout.split("\n", 1)[0]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One build at a time: tests and ranks may all ask for it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile_all(out: Path, torch: Path, torch_npu: Path) -> None:
    out.mkdir()
    objects = home() / "objects"
    objects.mkdir(exist_ok=True)
    flags = [*sources.COMPILE, *sources.include_flags(torch, torch_npu)]
    work = [source for library in sources.LIBRARIES for source in library.sources()]
    work.sort(key=lambda source: source.parent.name == "runtime")  # the slow ones first
    with ThreadPoolExecutor(_JOBS) as pool:
        absent = pool.submit(audit.imported_names, torch, torch_npu)
        made = dict(zip(work, pool.map(lambda source: _object(source, objects, flags), work), strict=True))
    stubs = out / "stubs.c"
    runtime = [made[source] for source in sources.LIBRARIES[0].sources()]
    stubs.write_text(audit.stubs(absent.result() - _defined(runtime)), encoding="utf-8")
    for library in sources.LIBRARIES:
        parts: list[object] = [made[source] for source in library.sources()]
        if library is sources.LIBRARIES[0]:
            parts += ["-x", "c", stubs, "-x", "none"]
        _run(*parts, "-fPIC", "-w", "-o", out / library.name, *sources.link_flags(library, torch, out))
    for name in sources.EMPTY:
        _run("-shared", f"-Wl,-soname,{name}", "-x", "c", os.devnull, "-o", out / name)
    stubs.unlink()


def _object(source: Path, folder: Path, flags: list[str]) -> Path:
    """The compiled source, from the cache of objects if it is there."""
    headers = [path for path in sources.all_files() if path.suffix == ".h"]
    target = folder / f"{source.stem}-{_digest([source, *headers], flags)}.o"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.o")
        _run(*flags, "-c", source, "-o", part)
        part.replace(target)
    return target


def _defined(objects: list[Path]) -> set[str]:
    done = subprocess.run(["nm", "--defined-only", *map(str, objects)], capture_output=True, text=True)
    return {line.split()[-1] for line in done.stdout.splitlines() if line.split()}


def _run(*arguments: object) -> None:
    command = [compiler(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SimError(
            f"{' '.join(command)}\n{done.stderr[-3000:]}\nIs {compiler()} a C++20 compiler (g++ 11 or later)?"
        )

#!/usr/bin/env python3
"""The supported lines of megatron-core side by side, each in a folder that stands first on PYTHONPATH.

    python scripts/megatron_lines.py install [VERSION ...]     what is there is kept; default: every line
    python scripts/megatron_lines.py run VERSION -- command... the command with that line as megatron.core

A wheel is unpacked into ``.megatron/VERSION/`` with its dist-info, so that importlib.metadata answers for it. From 0.17
on PyPI's wheels are for Python 3.12 and later: their Python files run on 3.10 and 3.11 too, and their compiled helper
(``datasets/helpers_cpp``, for indexed datasets) loads in 3.12 alone. 0.18 and later import triton, on a
CPU too: it is installed beside them unless the environment has it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".megatron"
#: The release of each line that the tests run, and the oldest Python that it has wheels for.
VERSIONS = {"0.12.1": (3, 10), "0.16.1": (3, 10), "0.18.2": (3, 12), "0.19.2": (3, 12)}
#: Lines that cannot be imported without triton; torch itself refuses one before 3.
NEED_TRITON = ("0.18.2", "0.19.2")
TRITON = "triton>=3.5,<4"
TRITON_FOLDER = FOLDER / f"triton-{sys.implementation.cache_tag}"  # compiled: one for each Python


def folder(version: str) -> Path:
    """Where a line is unpacked. Raises ValueError for a version that is not supported."""
    if version not in VERSIONS:
        raise ValueError(f"VERSION={version!r} is not a supported line; allowed: {', '.join(VERSIONS)}")
    return FOLDER / version


def environment(version: str) -> dict[str, str]:
    """This process's environment with the line first on PYTHONPATH. Raises ValueError when it is not unpacked."""
    place = folder(version)
    if not _complete(version):
        raise ValueError(f"{place} has no megatron-core {version}; python scripts/megatron_lines.py install {version}")
    triton = [str(TRITON_FOLDER)] if version in NEED_TRITON and not _has_triton() else []
    paths = [str(place), *triton, *filter(None, [os.environ.get("PYTHONPATH", "")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def install(version: str) -> None:
    """Fetches and unpacks one line, whole or not at all, and triton where it needs it; what is there is kept."""
    if _complete(version):
        print(f"megatron-core {version}: {folder(version)} is there")
        return
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        wheels, unpacked = Path(scratch, "wheels"), Path(scratch, "unpacked")
        python = "{}.{}".format(*max(VERSIONS[version], sys.version_info[:2]))
        where = ["--only-binary=:all:", "--python-version", python, "--dest", str(wheels)]
        _pip("download", *where, f"megatron-core=={version}")
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(unpacked)
        shutil.rmtree(folder(version), ignore_errors=True)
        unpacked.rename(folder(version))
        if version in NEED_TRITON and not _has_triton() and not TRITON_FOLDER.is_dir():
            _pip("install", "--target", f"{scratch}/triton", TRITON)
            Path(scratch, "triton").rename(TRITON_FOLDER)
    print(f"megatron-core {version}: unpacked into {folder(version)}")


def _complete(version: str) -> bool:
    triton = version not in NEED_TRITON or _has_triton() or TRITON_FOLDER.is_dir()
    return triton and (folder(version) / f"megatron_core-{version}.dist-info" / "METADATA").is_file()


def _has_triton() -> bool:
    """Whether the environment itself has it, as with a CUDA build of torch."""
    return importlib.util.find_spec("triton") is not None


def _pip(command: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps", *arguments]
    )
    if done.returncode:
        raise ValueError(f"'pip {command} --no-deps {' '.join(arguments)}' failed; its message stands above")


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    getter = commands.add_parser("install", help="fetch and unpack what is missing")
    getter.add_argument("version", nargs="*", help=f"of {', '.join(VERSIONS)}; default all")
    runner = commands.add_parser("run", help="run a command with one line")
    runner.add_argument("version")
    runner.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- command")
    arguments = parser.parse_args()
    try:
        if arguments.command == "install":
            for version in arguments.version or VERSIONS:
                install(version)
            return 0
        argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
        if not argv:
            parser.error("run: no command; write it after --")
        return subprocess.run(argv, env=environment(arguments.version)).returncode
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

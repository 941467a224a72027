"""Whether a torch-npu asks of CANN, and offers us, what was recorded: its link-time names and our operators' schemas.

    python -m fluid_npu.sim.upgrade             # the torch-npu that the simulator runs
    python -m fluid_npu.sim.upgrade --newest    # the newest on the package index
    python -m fluid_npu.sim.upgrade FILE.whl    # a wheel, for any version of torch

Prints what differs by name, exit code 1 when something does. Nothing of the wheel is imported or run: names come from
nm, schemas from the text in its library. After looking at each, ``--record`` writes what is there now.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fluid_npu.sim import audit
from fluid_npu.sim.environment import prepare_packages, torch_folder
from fluid_npu.sim.errors import SimError

RECORD = Path(__file__).parent / "schemas.json"
ABSENT = "absent"


def recorded() -> dict[str, Any]:
    """'torch_npu': a version; 'link_names': its names of CANN; 'schemas': name or name.overload to schema."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def differences(torch_npu: Path) -> list[str]:
    """What a torch_npu folder has beyond, or other than, the record; one line each, beginning with the name."""
    record = recorded()
    names = audit.imported_names(torch_folder(), torch_npu)
    lines = [
        f"{name}: a new link-time name; simulate it, or look at it and record it"
        for name in sorted(names - set(record["link_names"]))
    ]
    return lines + changed(record["schemas"], schemas_in(torch_npu / "lib" / "libtorch_npu.so", record["schemas"]))


def changed(wanted: dict[str, str], present: dict[str, str]) -> list[str]:
    """Schemas that are not the recorded ones, one line each."""
    return [
        f"{name}: recorded {schema}, here {present[name]}" for name, schema in wanted.items() if present[name] != schema
    ]


def schemas_in(library: Path, names: Iterable[str]) -> dict[str, str]:
    """The schema of each ``npu`` operator ('name' or 'name.overload') in a library's text, or 'absent'."""
    data = library.read_bytes()
    found = {}
    for name in names:
        texts = re.findall(rb"\0(?:npu::)?(" + re.escape(name.encode()) + rb"\([^\0]*\) -> [^\0]+)\0", data)
        found[name] = " or ".join(sorted({_normal(text.decode()) for text in texts})) or ABSENT
    return found


def _normal(schema: str) -> str:
    """As torch prints it: defaults in its own form."""
    import torch

    return str(torch._C.parse_schema(f"npu::{schema}"))


def newest_wheel(folder: Path) -> Path:
    """Downloads the newest torch-npu for this Python. Raises SimError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), "torch-npu"], capture_output=True, text=True)
    if done.returncode:
        raise SimError(f"pip could not download torch-npu: {done.stderr.strip()[-500:]}; give a wheel's path instead")
    return next(folder.glob("torch_npu-*.whl"))


def unpacked(wheel: Path, folder: Path) -> Path:
    """The torch_npu folder of a wheel, below ``folder``. Raises SimError for a file that is none."""
    try:
        zipfile.ZipFile(wheel).extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise SimError(f"{wheel}: it is not a wheel that can be read ({error}); give the path of a .whl") from error
    if not (folder / "torch_npu" / "lib").is_dir():
        raise SimError(f"{wheel}: there is no torch_npu/lib in it; give a wheel of torch-npu")
    return folder / "torch_npu"


def main(argv: Sequence[str] | None = None) -> int:
    """See the module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fluid_npu.sim.upgrade", description=__doc__.split("\n")[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="a wheel of torch-npu; default: what the simulator runs")
    parser.add_argument("--newest", action="store_true", help="download the newest from the package index")
    parser.add_argument("--record", action="store_true", help="write what is there as the record")
    given = parser.parse_args(argv)
    if given.wheel is not None and given.newest:
        parser.error(f"--newest and {given.wheel}: give one of them")
    with tempfile.TemporaryDirectory() as work:
        try:
            return _compare(given, Path(work))
        except SimError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 2


def _compare(given: argparse.Namespace, work: Path) -> int:
    wheel = newest_wheel(work) if given.newest else given.wheel
    torch_npu = unpacked(wheel, work / "wheel") if wheel is not None else prepare_packages() / "torch_npu"
    if given.record:
        _write(torch_npu)
    lines = differences(torch_npu)
    version = version_of(torch_npu)
    print("\n".join([f"torch-npu {version} against the record of {recorded()['torch_npu']}:", *lines]))
    print(f"{len(lines)} differences")
    return 1 if lines else 0


def version_of(torch_npu: Path) -> str:
    """The version that a torch_npu folder says it has."""
    text = (torch_npu / "version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    return found[1].partition("+")[0] if found else "unknown"


def _write(torch_npu: Path) -> None:
    record = {
        "torch_npu": version_of(torch_npu),
        "link_names": sorted(audit.imported_names(torch_folder(), torch_npu)),
        "schemas": schemas_in(torch_npu / "lib" / "libtorch_npu.so", recorded()["schemas"]),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

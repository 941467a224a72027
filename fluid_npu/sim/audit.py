"""What torch_npu asks of CANN when it is loaded: the names it is linked with, and stubs for those not simulated.

``fluid_npu.sim.upgrade`` compares another torch_npu with the recorded names.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from fluid_npu.sim.errors import SimError

# Functions that carry arguments to the legacy operator path or to the profiler. They return 0 and do nothing: the
# legacy path itself (aclopCompileAndExecute) ends the process.
QUIET_PREFIXES = ("Msprof", "aclop", "aclCreate", "aclDestroy", "aclGetTensorDesc", "aclSetTensor")

# Linked by torch-npu 2.13.0 and not simulated; a call ends the process by name.
KNOWN_ABSENT = frozenset(
    {
        *("aclrtBinaryGetFunction", "aclrtBinaryLoadFromData", "aclrtGetFunctionAddr"),
        *("aclrtMemExportToShareableHandle", "aclrtMemImportFromShareableHandle", "aclrtMemSetPidToShareableHandle"),
        *("rtDevBinaryRegister", "rtFunctionRegister", "rtGetC2cCtrlAddr", "rtKernelLaunch"),
    }
)

_OF_CANN = ("acl", "rt", "Msprof", "prof", "ge")


def imported_names(torch: Path, torch_npu: Path) -> set[str]:
    """Names of CANN that torch_npu's libraries need when they are loaded."""
    provided: set[str] = set()  # torch's own libraries have C++ names only, and a third of a million of them
    for library in [*(torch_npu / "lib").glob("*.so"), *_system_libraries(torch)]:
        provided |= symbols(library, "--defined-only")
    wanted: set[str] = set()
    linked = ("libtorch_npu.so", "libtensorpipe.so", "libnpu_profiler.so")
    for library in [*(torch_npu / "lib" / name for name in linked), *torch_npu.glob("_C*.so")]:
        wanted |= symbols(library, "--undefined-only")
    return {name for name in wanted - provided if name.startswith(_OF_CANN)}


def symbols(library: Path, kind: str) -> set[str]:
    """Dynamic symbols of a library ('--defined-only' or '--undefined-only'), without weak ones."""
    try:
        done = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SimError("there is no nm; install binutils (it comes with g++)") from error
    lines = (line.split() for line in done.stdout.splitlines() if " w " not in line)
    return {words[-1].split("@")[0] for words in lines if words}


def unknown_names(absent: Iterable[str]) -> list[str]:
    """Names that torch_npu links and nobody has looked at: neither simulated, nor quiet, nor known to be absent."""
    return sorted(name for name in absent if not name.startswith(QUIET_PREFIXES) and name not in KNOWN_ABSENT)


def stubs(absent: Iterable[str]) -> str:
    """C source of the functions that are not simulated."""
    lines = ["void fluidsim_stop(const char* message);"]
    for name in sorted(absent):
        quiet = name.startswith(QUIET_PREFIXES)
        body = "return 0;" if quiet else f'fluidsim_stop("{name} is not simulated"); return 0;'
        lines.append(f"long {name}(void) {{ {body} }}")
    return "\n".join(lines) + "\n"


def _system_libraries(torch: Path) -> list[Path]:
    done = subprocess.run(["ldd", str(torch / "lib" / "libtorch_python.so")], capture_output=True, text=True)
    found = [Path(word) for word in done.stdout.split() if word.startswith("/") and ".so" in word]
    return [library for library in found if torch not in library.parents]

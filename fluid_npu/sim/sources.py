"""Which C++ files make which library of the simulator, and how each is compiled and linked.

The libraries have the names under which torch_npu looks for CANN's. Their headers come from the installed wheels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"

# Libraries that torch_npu is linked with and of which it uses nothing here: empty ones satisfy the linker.
EMPTY = ("libge_runner.so", "libgraph.so", "libacl_tdt_channel.so")


@dataclass(frozen=True, kw_only=True)
class Library:
    """One shared library. ``needs``: libraries beside it; ``torch``: whether it uses libtorch."""

    name: str
    folder: str
    needs: tuple[str, ...] = ()
    torch: bool = False
    only: str | None = None  # one file of the folder
    without: tuple[str, ...] = ()

    def sources(self) -> list[Path]:
        """Its C++ files, sorted."""
        files = [CSRC / self.folder / self.only] if self.only else sorted((CSRC / self.folder).glob("*.cpp"))
        return [path for path in files if path.name not in self.without]


# In the order in which they can be linked.
LIBRARIES = (
    Library(name="libascendcl.so", folder="runtime", without=("op_compiler.cpp",)),
    Library(name="libacl_op_compiler.so", folder="runtime", only="op_compiler.cpp", needs=("ascendcl",)),
    Library(name="libhccl.so", folder="hccl", needs=("ascendcl",), torch=True),
    Library(name="libopapi.so", folder="opapi", needs=("ascendcl",), torch=True),
    Library(name="libfluid_sim_bridge.so", folder="bridge", needs=("ascendcl",), torch=True),
)

COMPILE = ("-std=c++20", "-O1", "-fPIC", "-w")


def include_flags(torch: Path, torch_npu: Path) -> list[str]:
    """-I flags for all sources."""
    folders = [
        torch_npu / "include",
        torch_npu / "include" / "third_party" / "hccl" / "inc",
        torch / "include",
        torch / "include" / "torch" / "csrc" / "api" / "include",
        CSRC / "runtime",
    ]
    return [f"-I{folder}" for folder in folders]


def link_flags(library: Library, torch: Path, out: Path) -> list[str]:
    """Everything after the objects. torch's libraries are in the process already, so no path to them is kept."""
    flags = ["-shared", f"-Wl,-soname,{library.name}", f"-L{out}", "-Wl,--no-as-needed"]
    flags += [f"-l{name}" for name in library.needs]
    if library.torch:
        flags += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    return [*flags, "-lpthread", "-ldl"]


def all_files() -> list[Path]:
    """Every C++ source and header, sorted."""
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h"))

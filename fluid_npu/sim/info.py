"""What ``fluid-npu sim info`` tells."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from fluid_npu.sim.build import is_built, library_folder
from fluid_npu.sim.environment import TORCH_NPU, check_machine, compiler, home, packages_folder
from fluid_npu.sim.execute import SOCS
from fluid_npu.sim.sources import CSRC


def describe() -> dict[str, Any]:
    """Facts about the simulator here. Raises SimError where it cannot work."""
    check_machine()
    return {
        "torch": metadata.version("torch"),
        "torch_npu": TORCH_NPU,
        "compiler": compiler(),
        "home": str(home()),
        "packages": str(packages_folder()),
        "library": str(library_folder()),
        "built": is_built(),
        "socs": list(SOCS),
        "operators": operators(),
        "collectives": collectives(),
    }


def operators() -> list[str]:
    """The aclnn operators that the sources define."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((CSRC / "opapi").glob("*.cpp")))
    return sorted(f"aclnn{name}" for name in re.findall(r"^ACLNN\((\w+),", text, re.M))


def collectives() -> list[str]:
    """The collectives that the sources define."""
    text = (CSRC / "hccl" / "collectives.cpp").read_text(encoding="utf-8")
    return sorted(re.findall(r"^HcclResult (Hccl\w+)\(", text, re.M))

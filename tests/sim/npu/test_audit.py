"""The recorded schemas are those of the operators that are really registered; the upgrade guard reads only text."""

from __future__ import annotations

import re
from pathlib import Path

from fluid_npu.sim import audit, upgrade


def test_no_link_time_name_is_unknown(torch_npu):
    names = set(upgrade.recorded()["link_names"])
    simulated = audit.symbols(next(Path(path) for path in loaded("libascendcl.so")), "--defined-only")
    assert len(names) > 80 and not audit.unknown_names(names - simulated)
    assert names >= audit.KNOWN_ABSENT, "remove what torch_npu no longer links"


def loaded(name: str) -> list[str]:
    """Paths of the loaded libraries of that name."""
    maps = Path("/proc/self/maps").read_text().split()
    return [word for word in maps if word.endswith(f"/{name}")]


def test_the_recorded_schemas_are_the_registered_ones(torch_npu):
    import torch

    wanted = upgrade.recorded()["schemas"]
    present = dict.fromkeys(wanted, upgrade.ABSENT)
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("npu::")
        present[f"{name}.{schema.overload_name}" if schema.overload_name else name] = str(schema)
    assert upgrade.changed(wanted, present) == []


def test_every_operator_that_our_kernels_call_is_recorded():
    folder = Path(upgrade.__file__).parents[1] / "device" / "kernels"
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("npu_*.py"))
    called = set(re.findall(r"self\._npu\.(npu_\w+)\(", text))
    assert len(called) > 8 and called <= set(upgrade.recorded()["schemas"])

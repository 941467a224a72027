"""The installed torch_npu is the one that was looked at: its link-time names and the schemas of what we call."""

from __future__ import annotations

from pathlib import Path

from fluid_npu.sim import audit


def test_no_link_time_name_is_new(torch_npu):
    import torch

    names = audit.imported_names(Path(torch.__file__).parent, Path(torch_npu.__file__).parent)
    simulated = audit.symbols(next(Path(path) for path in loaded("libascendcl.so")), "--defined-only")
    assert len(names) > 80 and not audit.unknown_names(names - simulated)
    assert names >= audit.KNOWN_ABSENT, "remove what torch_npu no longer links"


def loaded(name: str) -> list[str]:
    """Paths of the loaded libraries of that name."""
    maps = Path("/proc/self/maps").read_text().split()
    return [word for word in maps if word.endswith(f"/{name}")]


def test_the_schemas_of_the_operators_we_call_are_the_recorded_ones():
    assert audit.schema_differences() == []


def test_a_changed_schema_is_named(monkeypatch):
    monkeypatch.setattr(audit, "installed_schemas", lambda names: dict.fromkeys(names, "absent"))
    assert any(line.startswith("npu_swiglu: recorded npu::npu_swiglu(") for line in audit.schema_differences())

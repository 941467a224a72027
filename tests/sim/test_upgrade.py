"""The upgrade guard: another torch-npu's link-time names and the schemas of what we call, found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluid_npu.sim import audit, upgrade
from fluid_npu.sim.environment import prepare_packages
from fluid_npu.sim.errors import SimError

SWIGLU = b"npu_swiglu(Tensor input, int dim=-1) -> Tensor"


@pytest.mark.timeout(600)  # the first run installs torch-npu
def test_the_installed_torch_npu_is_the_recorded_one() -> None:
    folder = prepare_packages() / "torch_npu"
    assert upgrade.differences(folder) == []
    assert upgrade.version_of(folder) == upgrade.recorded()["torch_npu"] == "2.13.0"
    # Nothing recorded is gone either, and the simulator knows each name or ends the process by it.
    assert audit.imported_names(upgrade.torch_folder(), folder) == set(upgrade.recorded()["link_names"])
    assert len(upgrade.recorded()["schemas"]) >= 16


@pytest.mark.nightly
def test_the_newest_torch_npu_asks_for_nothing_new(tmp_path: Path) -> None:
    folder = upgrade.unpacked(upgrade.newest_wheel(tmp_path), tmp_path / "wheel")
    assert upgrade.differences(folder) == [], f"torch-npu {upgrade.version_of(folder)}"


def test_a_new_link_time_name_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "lib" / "libtorch_npu.so"
    library.parent.mkdir()
    library.write_bytes(b"\0")
    known = set(upgrade.recorded()["link_names"])
    monkeypatch.setattr(audit, "imported_names", lambda torch, torch_npu: known | {"aclrtNewThing"})
    found = upgrade.differences(tmp_path)
    assert found[0] == "aclrtNewThing: a new link-time name; simulate it, or look at it and record it"
    assert all(line.endswith("here absent") for line in found[1:])  # the library is empty


def test_a_changed_schema_is_named(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"\x7fELF\0" + SWIGLU.replace(b"int dim", b"float alpha=1e-06, int dim") + b"\0more\0")
    wanted = {name: upgrade.recorded()["schemas"][name] for name in ("npu_swiglu", "npu_rms_norm")}
    first, second = upgrade.changed(wanted, upgrade.schemas_in(library, wanted))
    assert first.startswith("npu_swiglu: recorded npu::npu_swiglu(Tensor input, int dim=-1) -> Tensor, here npu::npu")
    assert "float alpha=9.9999999999999995e-07" in first
    assert second.startswith("npu_rms_norm: ") and second.endswith("here absent")


def test_schemas_are_read_whole_and_by_full_name(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    longer = b"npu_swiglu_backward(Tensor grad_output, Tensor input, int dim=-1) -> Tensor"
    library.write_bytes(b"\0npu::" + SWIGLU + b"\0" + longer + b"\0" + b"see " + SWIGLU + b"\0")
    found = upgrade.schemas_in(library, ["npu_swiglu", "npu_swiglu.List"])
    assert found == {"npu_swiglu": f"npu::{SWIGLU.decode()}", "npu_swiglu.List": "absent"}


def test_a_file_that_is_no_wheel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.whl"
    other.write_text("text")
    assert upgrade.main([str(other)]) == 2
    assert "other.whl: it is not a wheel" in capsys.readouterr().err
    with pytest.raises(SimError, match=r"absent\.whl: it is not a wheel"):
        upgrade.unpacked(tmp_path / "absent.whl", tmp_path)

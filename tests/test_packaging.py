"""What a wheel contains, and that no package called ``patches`` is installed beside ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the tracked sources, so that nothing is left behind in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("fluid_npu", "patches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_manifests_and_type_marker_are_inside(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    manifests = {f"fluid_npu/patches/{path.name}" for path in (ROOT / "patches").glob("*.toml")}
    assert manifests and manifests | {"fluid_npu/patches/__init__.py", "fluid_npu/py.typed"} <= names


def test_every_module_is_inside_and_tests_are_not(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fluid_npu").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "benchmarks/"))]


def test_fluid_npu_is_the_only_name_that_is_installed(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"fluid_npu"}


def test_metadata_names_version_licence_console_script_and_extras(wheel: zipfile.ZipFile) -> None:
    from fluid_npu.version import __version__

    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    for extra in ("dev", "plot", "npu"):
        assert f"\nProvides-Extra: {extra}\n" in metadata
    assert "fluid-npu = fluid_npu.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(name.startswith(f"{info}/licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_s_manifests_are_read_without_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import fluid_npu.adaptor as a; print(a.__file__, len(a.select(['cpu'])))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    where, count = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path) and int(count) > 20

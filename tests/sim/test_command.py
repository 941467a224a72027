"""``fluid-npu sim``: what the child's environment is, and errors that name the fix. Nothing is compiled here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fluid_npu.cli import main
from fluid_npu.sim import audit, build, environment, execute, sources
from fluid_npu.sim.errors import SimError


def test_the_child_finds_the_packages_and_libraries_first() -> None:
    base = {"LD_LIBRARY_PATH": "/a", "PATH": "/bin", "HOME": "/home/me"}
    env = execute.simulator_environment(base, Path("/packages"), Path("/library"))
    assert env["LD_LIBRARY_PATH"] == "/library:/a" and env["PYTHONPATH"] == "/packages"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0" and env["HOME"] == "/home/me"
    assert base == {"LD_LIBRARY_PATH": "/a", "PATH": "/bin", "HOME": "/home/me"}


def test_settings_become_the_simulator_s_variables(tmp_path: Path) -> None:
    chosen = execute.settings(soc="910C", devices=4, delay_seed=0, log=str(tmp_path / "log"), allow_fallback=True)
    assert chosen == {
        "FLUID_SIM_SOC": "Ascend910_9392",
        "FLUID_SIM_DEVICES": "4",
        "FLUID_SIM_DELAY_SEED": "0",
        "FLUID_SIM_LOG": str(tmp_path / "log"),
        "FLUID_SIM_FALLBACK": "allow",
    }
    assert (tmp_path / "log").is_dir()


@pytest.mark.parametrize(
    "words, text",
    [
        (["--soc", "910A", "--", "true"], "--soc '910A': allowed are 910B, 910C"),
        (["--devices", "0", "--", "true"], "--devices 0: it must be 1 or more"),
        (["--delay-us", "-1", "--", "true"], "--delay-us -1: it must be 1 or more"),
        ([], "no command; write it behind --"),
    ],
)
def test_wrong_flags_are_named(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "exec", *words]) == 2
    assert text in capsys.readouterr().err


def test_a_missing_compiler_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SimError, match="there is no no-such-compiler; install it .*apt install g\\+\\+"):
        environment.check_machine()


def test_another_torch_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.metadata, "version", lambda name: "2.7.1+cpu")
    with pytest.raises(SimError, match="torch 2.7.1\\+cpu is installed; use an environment with torch==2.13.0"):
        environment.torch_folder()


def test_another_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sys, "version_info", (3, 13, 0))
    with pytest.raises(SimError, match="use Python 3.10, 3.11 or 3.12"):
        environment.check_machine()


def test_a_missing_network_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLUID_SIM_HOME", str(tmp_path))
    monkeypatch.setenv("FLUID_SIM_WHEEL", str(tmp_path / "absent.whl"))
    with pytest.raises(SimError, match="pip could not install .*absent.whl.*\n.*pip download --no-deps torch-npu"):
        environment.prepare_packages()
    assert not environment.packages_folder().exists()


def test_a_compiler_s_error_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = tmp_path / "bad.cpp"
    bad.write_text("int main( {")
    with pytest.raises(SimError, match="bad.cpp:1(.|\n)*Is .* a C\\+\\+20 compiler"):
        build._object(bad, tmp_path, ["-std=c++20"])


def test_the_key_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build.library_folder()
    assert build.library_folder() == before
    extra = tmp_path / "more.cpp"
    extra.write_text("int more;")
    files = sources.all_files()
    monkeypatch.setattr(sources, "all_files", lambda: [*files, extra])
    assert build.library_folder() != before


def test_names_that_nobody_has_looked_at_are_reported() -> None:
    assert audit.unknown_names({"MsprofReportApi", "rtKernelLaunch", "aclopSetAttrInt"}) == []
    assert audit.unknown_names({"aclrtNewThing", "rtKernelLaunch"}) == ["aclrtNewThing"]


def test_a_stub_returns_or_ends_the_process_by_name() -> None:
    text = audit.stubs({"aclopSetAttrInt", "aclrtNewThing"})
    assert "long aclopSetAttrInt(void) { return 0; }" in text
    assert 'fluidsim_stop("aclrtNewThing is not simulated")' in text


def test_files_are_small_and_say_what_they_are_for() -> None:
    assert sources.all_files()
    for path in sources.all_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 300, path.name
        header = path.with_suffix(".h")
        assert lines[0].startswith("//") or header.exists(), path.name

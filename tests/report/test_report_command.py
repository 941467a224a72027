"""``fluid-npu report``: what it prints, its exit codes, and markdown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_npu.cli import main
from tests.support import results


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["report", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_it_says_what_it_wrote_and_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write_run(tmp_path / "in" / "first", steps=3)
    code, out, err = run(capsys, tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0
    assert "1. train: first" in out and "2 plot(s), 7 trace(s)" in out
    assert "not shown:" in err and "config.json: the run's flags" in err


def test_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write_run(tmp_path / "in", steps=3)
    code, out, _ = run(capsys, tmp_path / "in", "--out", tmp_path / "out", "--json")
    written = json.loads(out)
    assert code == 0 and Path(written["page"]).exists()
    assert len(written["traces"]) == 7 and len(written["unread"]) == 2


def test_markdown_has_the_same_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write_benches(tmp_path)
    code, out, _ = run(capsys, tmp_path / "overlap.json", "--markdown")
    assert code == 0
    assert "## overlap: overlap" in out and "* What overlap says." in out
    assert "| W0 | moe_dispatch AllToAll of layer 1 | - | 4,096.0 | 33.60 |" in out


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["nowhere", "--out", "out"], 2, "DIR nowhere: not there; give folders or files with results"),
        (["."], 2, "--out is missing: give the folder for the page, or --markdown"),
        ([".", "--json", "--markdown"], 2, "--json and --markdown both print"),
        ([".", "--out", "out"], 3, "no result in the paths"),
        ([".", "--markdown"], 3, "no result in the paths"),
    ],
)
def test_bad_usage_names_the_flag_and_the_fix(
    words: list[str],
    code: int,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    got, out, err = run(capsys, *words)
    assert (got, out) == (code, "") and reason in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write_run(tmp_path / "in", steps=3)
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, tmp_path / "in", "--out", tmp_path / "file")
    assert code == 1 and "cannot be written" in err


def test_it_loads_no_torch(tmp_path: Path) -> None:
    results.write_run(tmp_path / "in", steps=3)
    code = (
        "import sys; from fluid_npu.cli import main\n"
        f"code = main(['report', {str(tmp_path / 'in')!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
